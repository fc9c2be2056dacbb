/* swa._core.Engine: a model's weights and the calls on them. */
#include "pyengine.h"

#include <math.h>

#include "arena.h"

/* ---- construction ------------------------------------------------------------------------------------------- */

/* A new reference: converting a value may run code that takes it out of the config. */
static PyObject *config_value(PyObject *config, const char *key)
{
    PyObject *value = PyDict_GetItemString(config, key);
    if (!value)
        PyErr_Format(PyExc_ValueError, "the config has no %s", key);
    return Py_XNewRef(value);
}

static bool read_size(PyObject *config, const char *key, int64_t *out)
{
    PyObject *value = config_value(config, key);
    if (!value)
        return false;
    *out = PyLong_AsLongLong(value);
    Py_DECREF(value);
    if (*out == -1 && PyErr_Occurred())
        return false;
    if (*out < 1) {
        PyErr_Format(PyExc_ValueError, "%s is %lld; it must be at least 1", key, (long long)*out);
        return false;
    }
    return true;
}

static bool read_bool(PyObject *config, const char *key, bool *out)
{
    PyObject *value = config_value(config, key);
    if (!value)
        return false;
    const bool valid = PyBool_Check(value);
    if (!valid)
        PyErr_Format(PyExc_TypeError, "%s must be True or False, not %R", key, value);
    *out = value == Py_True;
    Py_DECREF(value);
    return valid;
}

static bool read_float(PyObject *config, const char *key, float *out)
{
    PyObject *value = config_value(config, key);
    if (!value)
        return false;
    double number = PyFloat_AsDouble(value);
    *out = (float)number;
    bool valid = !(number == -1.0 && PyErr_Occurred());
    if (valid && !(isfinite(*out) && *out >= 0)) {
        PyErr_Format(PyExc_ValueError, "%s is %R; it must be finite and not negative", key, value);
        valid = false;
    }
    Py_DECREF(value);
    return valid;
}

static bool read_config(PyObject *config, swa_config_t *out)
{
    return read_size(config, "vocab_size", &out->vocab_size) && read_size(config, "hidden_size", &out->hidden_size) &&
           read_size(config, "intermediate_size", &out->intermediate_size) &&
           read_size(config, "num_hidden_layers", &out->n_layers) &&
           read_size(config, "num_attention_heads", &out->n_heads) &&
           read_size(config, "num_key_value_heads", &out->n_kv_heads) &&
           read_size(config, "head_dim", &out->head_dim) && read_float(config, "rms_norm_eps", &out->rms_norm_eps) &&
           read_float(config, "rope_scale", &out->rope_scale) && read_bool(config, "tie_word_embeddings", &out->tied) &&
           read_bool(config, "qk_norm", &out->qk_norm) && read_bool(config, "q_bias", &out->q_bias) &&
           read_bool(config, "k_bias", &out->k_bias) && read_bool(config, "v_bias", &out->v_bias) &&
           read_bool(config, "o_bias", &out->o_bias) && read_bool(config, "gate_bias", &out->gate_bias) &&
           read_bool(config, "up_bias", &out->up_bias) && read_bool(config, "down_bias", &out->down_bias);
}

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"config", "dtype", "num_threads", "tier", "planned", NULL};
    PyObject *dictionary;
    const char *dtype_name = "none", *tier = NULL;
    long long n_threads = 0;
    int planned = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|$sLzp:Engine", names, &PyDict_Type, &dictionary, &dtype_name,
                                     &n_threads, &tier, &planned))
        return NULL;
    swa_dtype_t dtype;
    swa_config_t config;
    const swa_kernels_t *kernels = swa_tier_from_name(tier);
    int threads = swa_threads_from_number(n_threads);
    if (!kernels || threads < 0 || swa_dtype_from_name(dtype_name, &dtype) || !read_config(dictionary, &config))
        return NULL;
    PyObject *object = config_value(dictionary, "inv_freq");
    int64_t half = config.head_dim / 2;
    PyArrayObject *inv_freq = object ? swa_array_copy(object, "inv_freq", NPY_FLOAT32, 1, &half) : NULL;
    Py_XDECREF(object);
    engine_t *self = inv_freq ? (engine_t *)type->tp_alloc(type, 0) : NULL;
    if (self) {
        char message[SWA_MESSAGE_BYTES];
        swa_status_t status;
        config.inv_freq = PyArray_DATA(inv_freq);
        self->dtype = dtype == SWA_BFLOAT16 ? "bfloat16" : "float32";
        self->tier = swa_kernels_name(kernels);
        self->n_threads = threads;
        Py_BEGIN_ALLOW_THREADS
        status = swa_model_create(&config, dtype, kernels, planned, &self->model, message);
        Py_END_ALLOW_THREADS
        if (status == SWA_ERROR_MEMORY)
            PyErr_NoMemory();
        else if (status != SWA_OK)
            PyErr_SetString(PyExc_ValueError, message);
        if (status != SWA_OK)
            Py_CLEAR(self);
    }
    Py_XDECREF(inv_freq);
    return (PyObject *)self;
}

static void engine_dealloc(engine_t *self)
{
    PyTypeObject *type = Py_TYPE(self);
    swa_model_free(self->model);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- loading ------------------------------------------------------------------------------------------------ */

typedef struct {
    swa_call_t base;
    engine_t *engine;
    const char *tensor;
    int64_t layer, row_start;
    swa_source_t source;
    const void *data;
    size_t n_bytes;
} load_call_t;

static swa_status_t compute_load(swa_call_t *base)
{
    load_call_t *call = (load_call_t *)base;
    if (atomic_load(&call->engine->finished)) {
        PyOS_snprintf(base->message, sizeof base->message, "every tensor is loaded; finish() has been called");
        return SWA_ERROR_VALUE;
    }
    return swa_model_load_rows(call->engine->model, call->tensor, call->layer, call->row_start, call->source,
                               call->data, call->n_bytes, base->run.n_threads, base->message);
}

static PyObject *engine_load_rows(engine_t *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"tensor", "layer", "row_start", "dtype", "data", NULL};
    static const struct {
        const char *name;
        swa_source_t source;
    } sources[] = {{"F32", SWA_SOURCE_F32}, {"F16", SWA_SOURCE_F16}, {"BF16", SWA_SOURCE_BF16}};
    const char *tensor, *dtype;
    long long layer, row_start;
    Py_buffer data;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sLLsy*:load_rows", names, &tensor, &layer, &row_start, &dtype,
                                     &data))
        return NULL;
    size_t i = 0;
    while (i < Py_ARRAY_LENGTH(sources) && strcmp(sources[i].name, dtype))
        i++;
    int failed = -1;
    if (i == Py_ARRAY_LENGTH(sources)) {
        PyErr_Format(PyExc_ValueError, "dtype is '%s'; it must be F32, F16 or BF16", dtype);
    } else {
        load_call_t *call = swa_call_new(sizeof *call, self->n_threads, compute_load);
        if (call) {
            call->engine = self;
            call->tensor = tensor;
            call->layer = layer;
            call->row_start = row_start;
            call->source = sources[i].source;
            call->data = data.buf;
            call->n_bytes = (size_t)data.len;
            failed = swa_call_run(&call->base, self, NULL);
            PyMem_RawFree(call);
        }
    }
    PyBuffer_Release(&data);
    return failed ? NULL : Py_NewRef(Py_None);
}

static swa_status_t compute_finish(swa_call_t *base)
{
    engine_t *engine = ((load_call_t *)base)->engine;
    swa_status_t status = swa_model_finish(engine->model, base->message);
    if (status == SWA_OK)
        atomic_store(&engine->finished, true);
    return status;
}

static PyObject *engine_finish(engine_t *self, PyObject *Py_UNUSED(unused))
{
    load_call_t *call = swa_call_new(sizeof *call, self->n_threads, compute_finish);
    if (!call)
        return NULL;
    call->engine = self;
    int failed = swa_call_run(&call->base, self, NULL);
    PyMem_RawFree(call);
    return failed ? NULL : Py_NewRef(Py_None);
}

/* ---- runs over a whole sequence ----------------------------------------------------------------------------- */

/* The arrays of a call. */
enum {
    IDS,
    WINDOW,
    SINKS,
    FULL_FROM,
    FLIP_WINDOW,
    DECODE_WINDOW,
    DECODE_SINKS,
    NLL,
    GREEDY,
    RUN_NLL,
    RUN_GREEDY,
    LOGITS,
    CHOICE_WINDOW,
    CHOICE_WEIGHTS,
    REFERENCE,
    GRADIENT,
    MASS,
    N_ARRAYS
};

typedef struct {
    swa_call_t base;
    engine_t *engine;
    const int32_t *ids;
    int64_t n_tokens, prompt_len, first_row, capacity;
    swa_policy_t policy;
    const int64_t *flip_window, *decode_window, *decode_sinks;
    double *nll, *run_nll;
    uint8_t *greedy, *run_greedy;
    float *logits;
    swa_gates_t gates;
    const float *reference;
    double *gradient;
    int64_t near_window, near_sinks, n_last;
    double *mass;
    swa_session_t *session;
    PyArrayObject *arrays[N_ARRAYS]; /* own what the pointers above point to */
} sequence_call_t;

static swa_status_t compute_nll(swa_call_t *base)
{
    sequence_call_t *c = (sequence_call_t *)base;
    return swa_nll(c->engine->model, &base->run, c->ids, c->n_tokens, c->prompt_len, &c->policy, c->nll, c->greedy);
}

static swa_status_t compute_sweep(swa_call_t *base)
{
    sequence_call_t *c = (sequence_call_t *)base;
    return swa_sweep(c->engine->model, &base->run, c->ids, c->n_tokens, c->prompt_len, &c->policy, c->flip_window,
                     c->nll, c->greedy, c->run_nll, c->run_greedy);
}

/* Here and not where it is copied: it may be large, and the worker does not have the GIL. */
static swa_status_t check_reference(sequence_call_t *c)
{
    const int64_t n_answer = c->n_tokens - c->prompt_len, vocab_size = swa_model_config(c->engine->model)->vocab_size;
    for (int64_t row = 0; row < n_answer; row++) {
        if (atomic_load(&c->base.run.cancelled))
            return SWA_ERROR_CANCELLED;
        for (int64_t i = 0; i < vocab_size; i++)
            if (!isfinite(c->reference[row * vocab_size + i])) {
                PyOS_snprintf(c->base.message, sizeof c->base.message, "reference is not finite in row %lld",
                              (long long)row);
                return SWA_ERROR_VALUE;
            }
    }
    return SWA_OK;
}

static swa_status_t compute_gates(swa_call_t *base)
{
    sequence_call_t *c = (sequence_call_t *)base;
    swa_status_t status = c->reference ? check_reference(c) : SWA_OK;
    if (status != SWA_OK)
        return status;
    return swa_gates(c->engine->model, &base->run, c->ids, c->n_tokens, c->prompt_len, &c->gates, c->reference, c->nll,
                     c->greedy, c->gradient);
}

static swa_status_t compute_mass(swa_call_t *base)
{
    sequence_call_t *c = (sequence_call_t *)base;
    return swa_attention_mass(c->engine->model, &base->run, c->ids, c->n_tokens, c->policy.window, c->near_window,
                              c->near_sinks, c->n_last, c->mass);
}

static swa_status_t compute_logits(swa_call_t *base)
{
    sequence_call_t *c = (sequence_call_t *)base;
    return swa_logits(c->engine->model, &base->run, c->ids, c->n_tokens, &c->policy, c->first_row, c->logits);
}

static swa_status_t compute_start(swa_call_t *base)
{
    sequence_call_t *c = (sequence_call_t *)base;
    return swa_session_start(c->engine->model, &base->run, c->ids, c->n_tokens, &c->policy, c->decode_window,
                             c->decode_sinks, c->capacity, &c->session);
}

/* The data of an array that the call takes over; NULL where there is none. */
static void *keep(sequence_call_t *call, int which, PyArrayObject *array)
{
    call->arrays[which] = array;
    return array ? PyArray_DATA(array) : NULL;
}

static const int64_t *keep_layers(sequence_call_t *call, int which, PyObject *object, const char *name, int64_t least)
{
    return keep(call, which, swa_int64_copy(object, name, swa_model_config(call->engine->model)->n_layers, least));
}

static void end_sequence_call(sequence_call_t *call)
{
    if (!call)
        return;
    swa_session_free(call->session);
    for (int i = 0; i < N_ARRAYS; i++)
        Py_XDECREF(call->arrays[i]);
    PyMem_RawFree(call);
}

static bool keep_ids(sequence_call_t *call, PyObject *ids)
{
    if (!atomic_load(&call->engine->finished)) {
        PyErr_SetString(PyExc_RuntimeError, "load every tensor and call finish() first");
        return false;
    }
    const int64_t any = SWA_ANY;
    call->ids = keep(call, IDS, swa_array_copy(ids, "ids", NPY_INT32, 1, &any));
    if (!call->ids || swa_check_ids(call->arrays[IDS], swa_model_config(call->engine->model)->vocab_size))
        return false;
    call->n_tokens = PyArray_DIM(call->arrays[IDS], 0);
    return true;
}

static bool keep_sequence(sequence_call_t *call, PyObject *ids, PyObject *window, PyObject *sinks, PyObject *full_from)
{
    return keep_ids(call, ids) && (call->policy.window = keep_layers(call, WINDOW, window, "window", 0)) &&
           (call->policy.sinks = keep_layers(call, SINKS, sinks, "sinks", 0)) &&
           (call->policy.full_from = keep_layers(call, FULL_FROM, full_from, "full_from", 0));
}

/* A call on the tokens with the policy checked and copied, or NULL. */
static sequence_call_t *begin_sequence_call(engine_t *self, swa_status_t (*compute)(swa_call_t *), PyObject *ids,
                                            PyObject *window, PyObject *sinks, PyObject *full_from)
{
    sequence_call_t *call = swa_call_new(sizeof *call, self->n_threads, compute);
    if (!call)
        return NULL;
    call->engine = self;
    if (keep_sequence(call, ids, window, sinks, full_from))
        return call;
    end_sequence_call(call);
    return NULL;
}

/* Checks the prompt's length, and makes the outputs of the base run. */
static bool keep_answer(sequence_call_t *call, long long prompt_len)
{
    if (call->n_tokens < 2) {
        PyErr_SetString(PyExc_ValueError, "ids has 1 token; a prompt and an answer need at least 2");
        return false;
    }
    if (!swa_check_range("prompt_len", prompt_len, 1, call->n_tokens - 1))
        return false;
    call->prompt_len = prompt_len;
    int64_t n_answer = call->n_tokens - prompt_len;
    return (call->nll = keep(call, NLL, swa_array_new(NPY_FLOAT64, 1, &n_answer))) &&
           (call->greedy = keep(call, GREEDY, swa_array_new(NPY_BOOL, 1, &n_answer)));
}

static PyObject *engine_nll(engine_t *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids", "prompt_len", "window", "sinks", "full_from", "progress", NULL};
    PyObject *ids, *window, *sinks, *full_from, *progress = NULL, *result = NULL;
    long long prompt_len;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OLOOO|$O:nll", names, &ids, &prompt_len, &window, &sinks,
                                     &full_from, &progress))
        return NULL;
    sequence_call_t *call = begin_sequence_call(self, compute_nll, ids, window, sinks, full_from);
    if (call && keep_answer(call, prompt_len) && swa_call_run(&call->base, self, progress) == 0)
        result = PyTuple_Pack(2, call->arrays[NLL], call->arrays[GREEDY]);
    end_sequence_call(call);
    return result;
}

static PyObject *engine_sweep(engine_t *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids", "prompt_len", "window", "sinks", "full_from", "flip_window", "progress", NULL};
    PyObject *ids, *window, *sinks, *full_from, *flip_window, *progress = NULL, *result = NULL;
    long long prompt_len;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OLOOOO|$O:sweep", names, &ids, &prompt_len, &window, &sinks,
                                     &full_from, &flip_window, &progress))
        return NULL;
    sequence_call_t *call = begin_sequence_call(self, compute_sweep, ids, window, sinks, full_from);
    if (call && keep_answer(call, prompt_len) &&
        (call->flip_window = keep_layers(call, FLIP_WINDOW, flip_window, "flip_window", SWA_NO_FLIP))) {
        const int64_t runs[2] = {swa_model_config(self->model)->n_layers, call->n_tokens - call->prompt_len};
        if ((call->run_nll = keep(call, RUN_NLL, swa_array_new(NPY_FLOAT64, 2, runs))) &&
            (call->run_greedy = keep(call, RUN_GREEDY, swa_array_new(NPY_BOOL, 2, runs))) &&
            swa_call_run(&call->base, self, progress) == 0)
            result = PyTuple_Pack(4, call->arrays[NLL], call->arrays[RUN_NLL], call->arrays[GREEDY],
                                  call->arrays[RUN_GREEDY]);
    }
    end_sequence_call(call);
    return result;
}

static bool check_choices(const swa_gates_t *gates, int64_t layer)
{
    const int64_t *window = gates->window + layer * gates->n_choices;
    const double *weights = gates->weights + layer * gates->n_choices;
    double sum = 0.0;
    for (int64_t i = 0; i < gates->n_choices; i++) {
        if (window[i] < 0) {
            PyErr_Format(PyExc_ValueError, "window[%lld, %lld] is %lld; it must be at least 0", (long long)layer,
                         (long long)i, (long long)window[i]);
            return false;
        }
        if (!(weights[i] >= 0.0)) {
            PyErr_Format(PyExc_ValueError, "weights[%lld, %lld] is %s; it must be at least 0", (long long)layer,
                         (long long)i, isnan(weights[i]) ? "not a number" : "negative");
            return false;
        }
        sum += weights[i];
    }
    if (!(fabs(sum - 1.0) <= 1e-6)) {
        PyErr_Format(PyExc_ValueError, "weights[%lld] must add up to 1", (long long)layer);
        return false;
    }
    return true;
}

/* Checks [n_layers][n_choices] windows and weights, and makes the gradient. */
static bool keep_gates(sequence_call_t *call, PyObject *window, PyObject *sinks, PyObject *full_from, PyObject *weights)
{
    const swa_config_t *c = swa_model_config(call->engine->model);
    const int64_t any[2] = {c->n_layers, SWA_ANY};
    swa_gates_t *gates = &call->gates;
    if (!(gates->window = keep(call, CHOICE_WINDOW, swa_array_copy(window, "window", NPY_INT64, 2, any))))
        return false;
    gates->n_choices = PyArray_DIM(call->arrays[CHOICE_WINDOW], 1);
    if (gates->n_choices > SWA_MAX_CHOICES) {
        PyErr_Format(PyExc_ValueError, "window has %lld choices a layer; at most %d are possible",
                     (long long)gates->n_choices, SWA_MAX_CHOICES);
        return false;
    }
    const int64_t shape[2] = {c->n_layers, gates->n_choices};
    const int64_t gradient[3] = {c->n_layers, gates->n_choices, c->n_kv_heads};
    if (!(gates->weights = keep(call, CHOICE_WEIGHTS, swa_array_copy(weights, "weights", NPY_FLOAT64, 2, shape))) ||
        !(gates->sinks = keep_layers(call, SINKS, sinks, "sinks", 0)) ||
        !(gates->full_from = keep_layers(call, FULL_FROM, full_from, "full_from", 0)) ||
        !(call->gradient = keep(call, GRADIENT, swa_array_new(NPY_FLOAT64, 3, gradient))))
        return false;
    for (int64_t l = 0; l < c->n_layers; l++)
        if (!check_choices(gates, l))
            return false;
    return true;
}

/* Reference logits of the answer's rows; None: the objective is the NLL. */
static bool keep_reference(sequence_call_t *call, PyObject *reference)
{
    if (!reference || reference == Py_None)
        return true;
    const int64_t shape[2] = {call->n_tokens - call->prompt_len, swa_model_config(call->engine->model)->vocab_size};
    call->reference = keep(call, REFERENCE, swa_array_copy(reference, "reference", NPY_FLOAT32, 2, shape));
    return call->reference != NULL;
}

static PyObject *engine_gates(engine_t *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids",     "prompt_len", "window",   "sinks", "full_from",
                            "weights", "reference",  "progress", NULL};
    PyObject *ids, *window, *sinks, *full_from, *weights, *reference = NULL, *progress = NULL, *result = NULL;
    long long prompt_len;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OLOOOO|$OO:gates", names, &ids, &prompt_len, &window, &sinks,
                                     &full_from, &weights, &reference, &progress))
        return NULL;
    sequence_call_t *call = swa_call_new(sizeof *call, self->n_threads, compute_gates);
    if (!call)
        return NULL;
    call->engine = self;
    if (keep_ids(call, ids) && keep_answer(call, prompt_len) && keep_gates(call, window, sinks, full_from, weights) &&
        keep_reference(call, reference) && swa_call_run(&call->base, self, progress) == 0)
        result = PyTuple_Pack(3, call->arrays[NLL], call->arrays[GREEDY], call->arrays[GRADIENT]);
    end_sequence_call(call);
    return result;
}

static PyObject *engine_attention_mass(engine_t *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids", "window", "near_window", "near_sinks", "n_last", "progress", NULL};
    PyObject *ids, *window, *progress = NULL, *result = NULL;
    long long near_window, near_sinks, n_last;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOLLL|$O:attention_mass", names, &ids, &window, &near_window,
                                     &near_sinks, &n_last, &progress))
        return NULL;
    sequence_call_t *call = swa_call_new(sizeof *call, self->n_threads, compute_mass);
    if (!call)
        return NULL;
    call->engine = self;
    const swa_config_t *c = swa_model_config(self->model);
    const int64_t shape[2] = {c->n_layers, c->n_heads};
    if (keep_ids(call, ids) && (call->policy.window = keep_layers(call, WINDOW, window, "window", 0)) &&
        swa_check_range("near_window", near_window, 1, INT32_MAX) &&
        swa_check_range("near_sinks", near_sinks, 0, INT32_MAX) &&
        swa_check_range("n_last", n_last, 1, call->n_tokens) &&
        (call->mass = keep(call, MASS, swa_array_new(NPY_FLOAT64, 2, shape)))) {
        call->near_window = near_window;
        call->near_sinks = near_sinks;
        call->n_last = n_last;
        if (swa_call_run(&call->base, self, progress) == 0)
            result = Py_NewRef(call->arrays[MASS]);
    }
    end_sequence_call(call);
    return result;
}

static PyObject *engine_logits(engine_t *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids", "window", "sinks", "full_from", "first_row", "progress", NULL};
    PyObject *ids, *window, *sinks, *full_from, *progress = NULL, *result = NULL;
    long long first_row = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|$LO:logits", names, &ids, &window, &sinks, &full_from,
                                     &first_row, &progress))
        return NULL;
    sequence_call_t *call = begin_sequence_call(self, compute_logits, ids, window, sinks, full_from);
    if (call && swa_check_range("first_row", first_row, 0, call->n_tokens - 1)) {
        const int64_t shape[2] = {call->n_tokens - first_row, swa_model_config(self->model)->vocab_size};
        call->first_row = first_row;
        if ((call->logits = keep(call, LOGITS, swa_array_new(NPY_FLOAT32, 2, shape))) &&
            swa_call_run(&call->base, self, progress) == 0)
            result = Py_NewRef(call->arrays[LOGITS]);
    }
    end_sequence_call(call);
    return result;
}

static PyObject *engine_start(engine_t *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids",          "window",   "sinks",    "full_from", "decode_window",
                            "decode_sinks", "capacity", "progress", NULL};
    PyObject *ids, *window, *sinks, *full_from, *decode_window, *decode_sinks, *progress = NULL, *result = NULL;
    long long capacity;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOOL|$O:start", names, &ids, &window, &sinks, &full_from,
                                     &decode_window, &decode_sinks, &capacity, &progress))
        return NULL;
    sequence_call_t *call = begin_sequence_call(self, compute_start, ids, window, sinks, full_from);
    if (call && swa_check_range("capacity", capacity, call->n_tokens, INT32_MAX) &&
        (call->decode_window = keep_layers(call, DECODE_WINDOW, decode_window, "decode_window", 0)) &&
        (call->decode_sinks = keep_layers(call, DECODE_SINKS, decode_sinks, "decode_sinks", 0))) {
        call->capacity = capacity;
        if (swa_call_run(&call->base, self, progress) == 0)
            result = swa_wrap_session(self, &call->session);
    }
    end_sequence_call(call);
    return result;
}

static PyObject *engine_workspace_bytes(engine_t *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"kind", "n_tokens", "n_prefix", NULL};
    static const struct {
        const char *name;
        swa_work_t work;
    } kinds[] = {
        {"nll", SWA_WORK_NLL}, {"sweep", SWA_WORK_SWEEP}, {"logits", SWA_WORK_LOGITS}, {"decode", SWA_WORK_DECODE}};
    const char *kind;
    long long n_tokens, n_prefix = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sL|L:workspace_bytes", names, &kind, &n_tokens, &n_prefix) ||
        !swa_check_range("n_tokens", n_tokens, 1, INT32_MAX) || !swa_check_range("n_prefix", n_prefix, 0, n_tokens))
        return NULL;
    for (size_t i = 0; i < Py_ARRAY_LENGTH(kinds); i++)
        if (!strcmp(kinds[i].name, kind))
            return PyLong_FromSize_t(
                swa_workspace_bytes(self->model, kinds[i].work, n_tokens, n_prefix, self->n_threads));
    return PyErr_Format(PyExc_ValueError, "kind is '%s'; it must be nll, sweep, logits or decode", kind);
}

static PyObject *engine_gates_bytes(engine_t *self, PyObject *args)
{
    long long n_tokens, n_choices, n_reference = 0;
    if (!PyArg_ParseTuple(args, "LL|L:gates_bytes", &n_tokens, &n_choices, &n_reference) ||
        !swa_check_range("n_tokens", n_tokens, 1, INT32_MAX) ||
        !swa_check_range("n_choices", n_choices, 1, SWA_MAX_CHOICES) ||
        !swa_check_range("n_reference", n_reference, 0, n_tokens))
        return NULL;
    const int64_t copied = n_reference * swa_model_config(self->model)->vocab_size;
    return PyLong_FromSize_t(swa_add_sizes(swa_gates_bytes(self->model, n_tokens, n_choices, self->n_threads),
                                           swa_multiply_sizes((size_t)copied, sizeof(float))));
}

/* ---- attributes --------------------------------------------------------------------------------------------- */

static PyObject *engine_repr(engine_t *self)
{
    return PyUnicode_FromFormat("<swa._core.Engine: %lld layers, %s, %s kernels, %d threads>",
                                (long long)swa_model_config(self->model)->n_layers, self->dtype, self->tier,
                                self->n_threads);
}

static PyObject *engine_dtype(engine_t *self, void *Py_UNUSED(closure)) { return PyUnicode_FromString(self->dtype); }

static PyObject *engine_tier(engine_t *self, void *Py_UNUSED(closure)) { return PyUnicode_FromString(self->tier); }

static PyObject *engine_weight_bytes(engine_t *self, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(swa_model_bytes(self->model));
}

static PyObject *engine_layers(engine_t *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(swa_model_config(self->model)->n_layers);
}

static PyObject *engine_vocab_size(engine_t *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(swa_model_config(self->model)->vocab_size);
}

static PyObject *engine_num_threads(engine_t *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(self->n_threads);
}

static int engine_set_num_threads(engine_t *self, PyObject *value, void *Py_UNUSED(closure))
{
    if (!value) {
        PyErr_SetString(PyExc_AttributeError, "num_threads cannot be deleted");
        return -1;
    }
    long long number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred())
        return -1;
    int threads = swa_threads_from_number(number);
    if (threads < 0)
        return -1;
    self->n_threads = threads;
    return 0;
}

static PyMethodDef engine_methods[] = {
    {"load_rows", (PyCFunction)(void (*)(void))engine_load_rows, METH_VARARGS | METH_KEYWORDS,
     "Load a chunk of whole rows of a tensor."},
    {"finish", (PyCFunction)engine_finish, METH_NOARGS, "End loading: ValueError naming a tensor that is missing."},
    {"nll", (PyCFunction)(void (*)(void))engine_nll, METH_VARARGS | METH_KEYWORDS,
     "NLL in nats and greedy match of every answer token."},
    {"sweep", (PyCFunction)(void (*)(void))engine_sweep, METH_VARARGS | METH_KEYWORDS,
     "nll of the base policy, and of every policy that changes one layer's window."},
    {"gates", (PyCFunction)(void (*)(void))engine_gates, METH_VARARGS | METH_KEYWORDS,
     "Loss of every answer token with weighted attention windows, and the gradient of its mean."},
    {"attention_mass", (PyCFunction)(void (*)(void))engine_attention_mass, METH_VARARGS | METH_KEYWORDS,
     "Share of the last rows' attention that stays near, by layer and head."},
    {"gates_bytes", (PyCFunction)engine_gates_bytes, METH_VARARGS, "Bytes that gates() allocates."},
    {"logits", (PyCFunction)(void (*)(void))engine_logits, METH_VARARGS | METH_KEYWORDS,
     "Logits of the rows from first_row on."},
    {"start", (PyCFunction)(void (*)(void))engine_start, METH_VARARGS | METH_KEYWORDS,
     "Prefill the tokens and return a Session that generates from them."},
    {"workspace_bytes", (PyCFunction)(void (*)(void))engine_workspace_bytes, METH_VARARGS | METH_KEYWORDS,
     "Bytes that a call allocates beside the weights and its outputs."},
    {0},
};

static PyGetSetDef engine_attributes[] = {
    {"dtype", (getter)engine_dtype, NULL, "Compute type.", NULL},
    {"tier", (getter)engine_tier, NULL, "ISA tier of the kernels.", NULL},
    {"num_threads", (getter)engine_num_threads, (setter)engine_set_num_threads, "Threads per call.", NULL},
    {"weight_bytes", (getter)engine_weight_bytes, NULL, "Bytes of the packed weights.", NULL},
    {"num_hidden_layers", (getter)engine_layers, NULL, "Number of layers.", NULL},
    {"vocab_size", (getter)engine_vocab_size, NULL, "Number of token ids.", NULL},
    {0},
};

static PyType_Slot engine_slots[] = {
    {Py_tp_doc, "A model's packed weights, and the calls on them; _core.pyi describes both."},
    {Py_tp_new, engine_new},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_repr, engine_repr},
    {Py_tp_methods, engine_methods},
    {Py_tp_getset, engine_attributes},
    {0, NULL},
};

PyType_Spec swa_engine_spec = {
    .name = "swa._core.Engine",
    .basicsize = sizeof(engine_t),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = engine_slots,
};
