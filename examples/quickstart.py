"""From a checkpoint to a hybrid that answers, in a few cells. Runs as a script or cell by cell.

pip install '.[demo]'
python examples/quickstart.py [MODEL]      # default: SmolLM2-135M-Instruct, fetched if need be
"""

# %% A model: a hub id, a folder of safetensors, or a .gguf file
import sys

import swa
from swa.demo import fetch_model

source = sys.argv[1] if len(sys.argv) == 2 else fetch_model()
model = swa.load(source)
print(model)

# %% How sliding layers shall attend, and examples of what the model is for
policy = swa.AttentionPolicy(sliding_window=128, num_sink_tokens=4)
calibration = swa.examples.synthetic(model.tokenizer, prompt_tokens=1024)

# %% What full attention is worth in each layer
scores = swa.score_layers(model, calibration, policy, progress=True)
print(scores)

# %% Keep it in a quarter of them
chosen = swa.select(scores, swa.Budget(fraction=0.25))
print(chosen)

# %% What that costs on examples it was not chosen for
heldout = swa.examples.synthetic(model.tokenizer, prompt_tokens=1024, split="heldout")
hybrid = model.patch(chosen)
evaluations = {
    "full attention": swa.evaluate(model, heldout),
    "all sliding": swa.evaluate(model, heldout, policy=policy),
    "chosen": swa.evaluate(hybrid, heldout),
}
for name, evaluation in evaluations.items():
    print(f"{name:<15} {evaluation}")

# %% An answer, a report, and the scores for later
print(hybrid.generate(heldout[0].prompt_ids, max_new_tokens=16))
swa.report(scores, chosen, "report.html", evaluations=evaluations)
scores.save("scores.json")
