/* Test hooks: one kernel or driver at a time, for the oracles in tests/. They run on the worker like every call. */
#include "pycore.h"

enum { MAX_ARRAYS = 4 };

typedef struct {
    swa_call_t base;
    const swa_kernels_t *kernels;
    swa_dtype_t dtype;
    PyArrayObject *in[MAX_ARRAYS], *out[2];
    int64_t window, sinks, full_from;
    float eps;
    bool timed;
    double seconds; /* what a timed hook took */
    swa_peak_t peak;
    int64_t n_bytes;
} hook_call_t;

/* A call with its tier, dtype and threads checked, or NULL. */
static hook_call_t *begin_hook(swa_status_t (*compute)(swa_call_t *), const char *dtype, const char *tier,
                               long long n_threads)
{
    swa_dtype_t checked;
    const swa_kernels_t *kernels = swa_tier_from_name(tier);
    int threads = swa_threads_from_number(n_threads);
    if (!kernels || threads < 0 || swa_dtype_from_name(dtype, &checked))
        return NULL;
    hook_call_t *call = swa_call_new(sizeof *call, threads, compute);
    if (call) {
        call->kernels = kernels;
        call->dtype = checked;
    }
    return call;
}

static bool hook_input(hook_call_t *call, int i, PyObject *object, const char *name, int typenum, int n_dimensions,
                       const int64_t *shape)
{
    return (call->in[i] = swa_array_copy(object, name, typenum, n_dimensions, shape)) != NULL;
}

static bool hook_output(hook_call_t *call, int i, int typenum, int n_dimensions, const int64_t *shape)
{
    return (call->out[i] = swa_array_new(typenum, n_dimensions, shape)) != NULL;
}

/* Runs the call if `ready`, frees it and returns its output or outputs. */
static PyObject *end_hook(hook_call_t *call, bool ready)
{
    if (!call)
        return NULL;
    PyObject *result = NULL;
    if (ready && swa_call_run(&call->base, NULL, NULL) == 0) {
        if (call->timed)
            result = Py_BuildValue("Od", call->out[0], call->seconds);
        else
            result = call->out[1] ? PyTuple_Pack(2, call->out[0], call->out[1]) : Py_NewRef(call->out[0]);
    }
    for (int i = 0; i < MAX_ARRAYS; i++)
        Py_XDECREF(call->in[i]);
    Py_XDECREF(call->out[0]);
    Py_XDECREF(call->out[1]);
    PyMem_RawFree(call);
    return result;
}

/* ---- attention: q [T][H][d], k and v [T][G][d] -> [T][H][d] --------------------------------------------------- */

static swa_status_t compute_attention(swa_call_t *base)
{
    hook_call_t *c = (hook_call_t *)base;
    const npy_intp *q = PyArray_DIMS(c->in[0]), *k = PyArray_DIMS(c->in[1]);
    return swa_hook_attention(c->kernels, c->dtype, base->run.n_threads, PyArray_DATA(c->in[0]), PyArray_DATA(c->in[1]),
                              PyArray_DATA(c->in[2]), q[0], q[1], k[1], q[2], c->window, c->sinks, c->full_from,
                              PyArray_DATA(c->out[0]), &c->seconds);
}

static bool prepare_attention(hook_call_t *call, PyObject *q, PyObject *k, PyObject *v)
{
    const int64_t any[3] = {SWA_ANY, SWA_ANY, SWA_ANY};
    if (!hook_input(call, 0, q, "q", NPY_FLOAT32, 3, any))
        return false;
    const npy_intp *shape = PyArray_DIMS(call->in[0]);
    int64_t keys[3] = {shape[0], SWA_ANY, shape[2]};
    if (!hook_input(call, 1, k, "k", NPY_FLOAT32, 3, keys))
        return false;
    keys[1] = PyArray_DIM(call->in[1], 1);
    if (shape[1] % keys[1] || shape[2] % 2 || shape[2] > SWA_MAX_HEAD_DIM) {
        PyErr_SetString(PyExc_ValueError, "q needs a multiple of the heads of k, and an even head_dim of at most 1024");
        return false;
    }
    if (call->window < 0 || call->sinks < 0 || call->full_from < 0) {
        PyErr_SetString(PyExc_ValueError, "window, sinks and full_from must be at least 0");
        return false;
    }
    const int64_t out[3] = {shape[0], shape[1], shape[2]};
    return hook_input(call, 2, v, "v", NPY_FLOAT32, 3, keys) && hook_output(call, 0, NPY_FLOAT32, 3, out);
}

static PyObject *hook_attention(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"q",     "k",    "v",           "window", "sinks", "full_from",
                            "dtype", "tier", "num_threads", "timed",  NULL};
    PyObject *q, *k, *v;
    long long window, sinks, full_from, n_threads = 1;
    const char *dtype = "float32", *tier = NULL;
    int timed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOLLL|$szLp:attention", names, &q, &k, &v, &window, &sinks,
                                     &full_from, &dtype, &tier, &n_threads, &timed))
        return NULL;
    hook_call_t *call = begin_hook(compute_attention, dtype, tier, n_threads);
    if (call) {
        call->window = window;
        call->sinks = sinks;
        call->full_from = full_from;
        call->timed = timed;
    }
    return end_hook(call, call && prepare_attention(call, q, k, v));
}

/* ---- linear: x [M][K], w [N][K] -> [M][N] --------------------------------------------------------------------- */

static swa_status_t compute_linear(swa_call_t *base)
{
    hook_call_t *c = (hook_call_t *)base;
    const npy_intp *x = PyArray_DIMS(c->in[0]), *w = PyArray_DIMS(c->in[1]);
    return swa_hook_linear(c->kernels, c->dtype, base->run.n_threads, PyArray_DATA(c->in[0]), PyArray_DATA(c->in[1]),
                           x[0], w[0], x[1], PyArray_DATA(c->out[0]), &c->seconds);
}

static bool prepare_linear(hook_call_t *call, PyObject *x, PyObject *w)
{
    const int64_t any[2] = {SWA_ANY, SWA_ANY};
    if (!hook_input(call, 0, x, "x", NPY_FLOAT32, 2, any))
        return false;
    const int64_t weights[2] = {SWA_ANY, PyArray_DIM(call->in[0], 1)};
    if (!hook_input(call, 1, w, "w", NPY_FLOAT32, 2, weights))
        return false;
    const int64_t out[2] = {PyArray_DIM(call->in[0], 0), PyArray_DIM(call->in[1], 0)};
    return hook_output(call, 0, NPY_FLOAT32, 2, out);
}

static PyObject *hook_linear(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "w", "dtype", "tier", "num_threads", "timed", NULL};
    PyObject *x, *w;
    long long n_threads = 1;
    const char *dtype = "float32", *tier = NULL;
    int timed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$szLp:linear", names, &x, &w, &dtype, &tier, &n_threads, &timed))
        return NULL;
    hook_call_t *call = begin_hook(compute_linear, dtype, tier, n_threads);
    if (call)
        call->timed = timed;
    return end_hook(call, call && prepare_linear(call, x, w));
}

/* ---- rms_norm: x [M][N], weight [N] -> [M][N] ----------------------------------------------------------------- */

static swa_status_t compute_rms_norm(swa_call_t *base)
{
    hook_call_t *c = (hook_call_t *)base;
    const npy_intp *x = PyArray_DIMS(c->in[0]);
    swa_hook_rms_norm(c->kernels, PyArray_DATA(c->in[0]), PyArray_DATA(c->in[1]), x[0], x[1], c->eps,
                      PyArray_DATA(c->out[0]));
    return SWA_OK;
}

static bool prepare_rms_norm(hook_call_t *call, PyObject *x, PyObject *weight)
{
    const int64_t any[2] = {SWA_ANY, SWA_ANY};
    if (!hook_input(call, 0, x, "x", NPY_FLOAT32, 2, any))
        return false;
    const int64_t shape[2] = {PyArray_DIM(call->in[0], 0), PyArray_DIM(call->in[0], 1)};
    return hook_input(call, 1, weight, "weight", NPY_FLOAT32, 1, &shape[1]) &&
           hook_output(call, 0, NPY_FLOAT32, 2, shape);
}

static PyObject *hook_rms_norm(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "weight", "eps", "tier", NULL};
    PyObject *x, *weight;
    float eps;
    const char *tier = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOf|$z:rms_norm", names, &x, &weight, &eps, &tier))
        return NULL;
    hook_call_t *call = begin_hook(compute_rms_norm, "float32", tier, 1);
    if (call)
        call->eps = eps;
    return end_hook(call, call && prepare_rms_norm(call, x, weight));
}

/* ---- silu_mul: gate [N], up [N] -> [N] ------------------------------------------------------------------------ */

static swa_status_t compute_silu_mul(swa_call_t *base)
{
    hook_call_t *c = (hook_call_t *)base;
    swa_hook_silu_mul(c->kernels, PyArray_DATA(c->in[0]), PyArray_DATA(c->in[1]), PyArray_DIM(c->in[0], 0),
                      PyArray_DATA(c->out[0]));
    return SWA_OK;
}

static bool prepare_silu_mul(hook_call_t *call, PyObject *gate, PyObject *up)
{
    const int64_t any = SWA_ANY;
    if (!hook_input(call, 0, gate, "gate", NPY_FLOAT32, 1, &any))
        return false;
    const int64_t length = PyArray_DIM(call->in[0], 0);
    return hook_input(call, 1, up, "up", NPY_FLOAT32, 1, &length) && hook_output(call, 0, NPY_FLOAT32, 1, &length);
}

static PyObject *hook_silu_mul(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"gate", "up", "tier", NULL};
    PyObject *gate, *up;
    const char *tier = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$z:silu_mul", names, &gate, &up, &tier))
        return NULL;
    hook_call_t *call = begin_hook(compute_silu_mul, "float32", tier, 1);
    return end_hook(call, call && prepare_silu_mul(call, gate, up));
}

/* ---- log_prob: logits [M][V], targets [M] -> NLL [M], greedy [M] ---------------------------------------------- */

static swa_status_t compute_log_prob(swa_call_t *base)
{
    hook_call_t *c = (hook_call_t *)base;
    const npy_intp *logits = PyArray_DIMS(c->in[0]);
    return swa_hook_log_prob(c->kernels, PyArray_DATA(c->in[0]), logits[0], logits[1], PyArray_DATA(c->in[1]),
                             PyArray_DATA(c->out[0]), PyArray_DATA(c->out[1]));
}

static bool prepare_log_prob(hook_call_t *call, PyObject *logits, PyObject *targets)
{
    const int64_t any[2] = {SWA_ANY, SWA_ANY};
    if (!hook_input(call, 0, logits, "logits", NPY_FLOAT32, 2, any))
        return false;
    const int64_t rows = PyArray_DIM(call->in[0], 0), vocab_size = PyArray_DIM(call->in[0], 1);
    call->in[1] = swa_int64_copy(targets, "targets", rows, 0);
    if (!call->in[1])
        return false;
    const int64_t *values = PyArray_DATA(call->in[1]);
    for (int64_t i = 0; i < rows; i++) {
        if (values[i] >= vocab_size) {
            PyErr_Format(PyExc_ValueError, "targets[%lld] is %lld; logits has %lld columns", (long long)i,
                         (long long)values[i], (long long)vocab_size);
            return false;
        }
    }
    return hook_output(call, 0, NPY_FLOAT64, 1, &rows) && hook_output(call, 1, NPY_BOOL, 1, &rows);
}

static PyObject *hook_log_prob(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"logits", "targets", "tier", NULL};
    PyObject *logits, *targets;
    const char *tier = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$z:log_prob", names, &logits, &targets, &tier))
        return NULL;
    hook_call_t *call = begin_hook(compute_log_prob, "float32", tier, 1);
    return end_hook(call, call && prepare_log_prob(call, logits, targets));
}

/* ---- peak: what the machine can do --------------------------------------------------------------------------- */

static swa_status_t compute_peak(swa_call_t *base)
{
    hook_call_t *c = (hook_call_t *)base;
    return swa_hook_peak(c->kernels, c->peak, base->run.n_threads, c->n_bytes, PyArray_DATA(c->out[0]));
}

static bool prepare_peak(hook_call_t *call, const char *kind, long long n_bytes)
{
    const char *const kinds[] = {"f32", "bf16", "read"};
    const int64_t one = 1;
    int i = 0;
    while (i < 3 && strcmp(kinds[i], kind))
        i++;
    if (i == 3) {
        PyErr_Format(PyExc_ValueError, "kind is '%s'; it must be f32, bf16 or read", kind);
        return false;
    }
    if (n_bytes < 1) {
        PyErr_SetString(PyExc_ValueError, "n_bytes must be at least 1");
        return false;
    }
    call->peak = (swa_peak_t)i;
    call->n_bytes = n_bytes;
    return hook_output(call, 0, NPY_FLOAT64, 1, &one);
}

static PyObject *hook_peak(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"kind", "tier", "num_threads", "n_bytes", NULL};
    const char *kind, *tier = NULL;
    long long n_threads = 0, n_bytes = 1 << 30;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s|$zLL:peak", names, &kind, &tier, &n_threads, &n_bytes))
        return NULL;
    hook_call_t *call = begin_hook(compute_peak, "float32", tier, n_threads);
    PyObject *array = end_hook(call, call && prepare_peak(call, kind, n_bytes));
    PyObject *rate = array ? PyFloat_FromDouble(*(double *)PyArray_DATA((PyArrayObject *)array)) : NULL;
    Py_XDECREF(array);
    return rate;
}

/* ---- bf16_round_trip: bits [N] -> bits [N] -------------------------------------------------------------------- */

static swa_status_t compute_round_trip(swa_call_t *base)
{
    hook_call_t *c = (hook_call_t *)base;
    return swa_hook_bf16_round_trip(c->kernels, PyArray_DATA(c->in[0]), PyArray_DIM(c->in[0], 0),
                                    PyArray_DATA(c->out[0]));
}

static PyObject *hook_bf16_round_trip(PyObject *Py_UNUSED(module), PyObject *bits)
{
    const int64_t any = SWA_ANY;
    hook_call_t *call = begin_hook(compute_round_trip, "bfloat16", NULL, 1);
    bool ready = call && hook_input(call, 0, bits, "x", NPY_UINT16, 1, &any);
    if (ready) {
        const int64_t length = PyArray_DIM(call->in[0], 0);
        ready = hook_output(call, 0, NPY_UINT16, 1, &length);
    }
    return end_hook(call, ready);
}

#define HOOK(name) #name, (PyCFunction)(void (*)(void))hook_##name, METH_VARARGS | METH_KEYWORDS
PyMethodDef swa_hook_methods[] = {
    {HOOK(attention), "Test hook: attention of one layer, float32 in and out."},
    {HOOK(linear), "Test hook: x @ w.T through the packed weights."},
    {HOOK(rms_norm), "Test hook: RMSNorm of every row."},
    {HOOK(silu_mul), "Test hook: silu(gate) * up."},
    {HOOK(peak), "FLOP/s or bytes/s that this machine reaches at most."},
    {HOOK(log_prob), "Test hook: NLL in nats and greedy match of every row."},
    {"bf16_round_trip", hook_bf16_round_trip, METH_O, "Test hook: BF16 bits as loading stores them."},
    {0},
};
#undef HOOK
