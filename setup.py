"""Build swa._core: one object per C file, the kernels of each ISA tier with that tier's own flags.

Environment: SWA_OPENMP=0 builds on plain pthreads; SWA_SANITIZE=address|thread|undefined (commas
combine) instruments the code; SWA_WERROR=1 makes warnings errors; SWA_DEBUG=1 keeps it debuggable;
SWA_EMULATE_AMX=1 puts plain C for AMX's tile instructions, so that tests run anywhere.
"""

import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
TIERS = {  # kernels_<tier>.c: its flags; a tier that the compiler does not know is left out
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx_bf16": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# No -ffast-math: it would change the results, and zero subnormals for the whole process.
FLAGS = ["-std=c11", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-pthread"]


class BuildTiers(build_ext):
    """build_ext with flags per file, in parallel; unchanged objects are kept."""

    def build_extension(self, ext: Extension) -> None:
        flags, link_flags = list(FLAGS), ["-pthread", "-lm"]
        if sanitize := os.environ.get("SWA_SANITIZE"):
            flags += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g", "-O1"]
            link_flags.append(f"-fsanitize={sanitize}")
        if os.environ.get("SWA_WERROR") == "1":
            flags += ["-Wall", "-Wextra", "-Werror"]
        if os.environ.get("SWA_DEBUG") == "1":
            flags += ["-g3", "-Og", "-UNDEBUG"]
        known = dict(TIERS)
        if os.environ.get("SWA_EMULATE_AMX") == "1":
            flags.append("-DSWA_EMULATE_AMX")  # not with the macros: build_info() shows the flags
            known["amx_bf16"] = TIERS["avx512_bf16"]
        # The thread sanitizer does not understand libgomp's synchronisation.
        openmp = os.environ.get("SWA_OPENMP") != "0" and "thread" not in (sanitize or "")
        if openmp and self.accepts(["-fopenmp"], "_OPENMP"):
            flags.append("-fopenmp")
            link_flags.append("-fopenmp")

        tiers = {name: own for name, own in known.items() if self.accepts(own, *map(macro, own))}
        macros = [(f"SWA_HAVE_{tier.upper()}", "1") for tier in tiers]
        macros.append(("SWA_VERSION", f'"{self.distribution.get_version()}"'))
        macros.append(("SWA_BUILD_FLAGS", f'"{" ".join(flags)}"'))
        command = repr((self.compiler.compiler_so, flags, known, macros, ext.include_dirs))
        cache = Path(self.build_temp, hashlib.sha256(command.encode()).hexdigest()[:16])
        cache.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            kept = cache / f"{Path(source).stem}.o"
            if not newer_group([source, *ext.depends], str(kept)):
                return str(kept)
            own = tiers.get(Path(source).stem.removeprefix("kernels_"), [])
            with tempfile.TemporaryDirectory(dir=cache) as scratch:  # so that builds may overlap
                [made] = self.compiler.compile(
                    [source],
                    output_dir=scratch,
                    macros=macros,
                    include_dirs=ext.include_dirs,
                    extra_postargs=flags + own,
                )
                os.replace(made, kept)
            return str(kept)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, target, extra_postargs=link_flags)

    def accepts(self, flags: list[str], *macros: str) -> bool:
        """Whether the compiler takes the flags and then defines the macros."""
        needs = "".join(f"#ifndef {name}\n#error {name}\n#endif\n" for name in macros)
        with tempfile.TemporaryDirectory() as scratch:
            probe = Path(scratch, "probe.c")
            probe.write_text(f"{needs}int swa_probe(void);\nint swa_probe(void) {{ return 0; }}\n")
            try:
                self.compiler.compile([str(probe)], output_dir=scratch, extra_postargs=flags)
            except CompileError:
                return False
        return True


def macro(flag: str) -> str:
    """The macro that an ISA flag defines: -mavx512bf16 gives __AVX512BF16__."""
    return f"__{flag.removeprefix('-m').replace('-', '_').upper()}__"


setup(
    ext_modules=[
        Extension(
            "swa._core",
            sources=sorted(str(path) for path in Path("csrc").glob("*.c")),
            depends=["setup.py", *sorted(str(path) for path in Path("csrc").glob("*.[hi]*"))],
            include_dirs=["csrc", numpy.get_include()],
        )
    ],
    cmdclass={"build_ext": BuildTiers},
)
