/* swa._core.Session: a sequence being generated. */
#include "pyengine.h"

typedef struct {
    PyObject_HEAD
    engine_t *engine;
    swa_session_t *session;
    atomic_llong n_tokens; /* written by the worker */
} session_t;

typedef struct {
    swa_call_t base;
    session_t *owner;
    int32_t token;
    float *logits; /* [vocab_size], out */
} step_call_t;

PyObject *swa_wrap_session(engine_t *engine, swa_session_t **session)
{
    swa_state_t *state = PyType_GetModuleState(Py_TYPE(engine));
    PyTypeObject *type = (PyTypeObject *)state->session_type;
    session_t *self = (session_t *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->engine = (engine_t *)Py_NewRef(engine);
    self->session = *session;
    atomic_init(&self->n_tokens, swa_session_tokens(*session));
    *session = NULL;
    return (PyObject *)self;
}

static void session_dealloc(session_t *self)
{
    PyTypeObject *type = Py_TYPE(self);
    swa_session_free(self->session);
    Py_XDECREF(self->engine);
    type->tp_free(self);
    Py_DECREF(type);
}

static swa_status_t compute_read(swa_call_t *base)
{
    const step_call_t *call = (const step_call_t *)base;
    const int64_t vocab_size = swa_model_config(call->owner->engine->model)->vocab_size;
    memcpy(call->logits, swa_session_logits(call->owner->session), (size_t)vocab_size * sizeof(float));
    return SWA_OK;
}

static swa_status_t compute_step(swa_call_t *base)
{
    const step_call_t *call = (const step_call_t *)base;
    swa_session_t *session = call->owner->session;
    if (swa_session_tokens(session) >= swa_session_capacity(session)) {
        PyOS_snprintf(base->message, sizeof base->message, "the session is full: its capacity is %lld tokens",
                      (long long)swa_session_capacity(session));
        return SWA_ERROR_VALUE;
    }
    swa_status_t status = swa_session_step(session, &base->run, call->token);
    atomic_store(&call->owner->n_tokens, swa_session_tokens(session));
    return status == SWA_OK ? compute_read(base) : status;
}

/* Runs a step, or only reads, and returns the logits. */
static PyObject *session_call(session_t *self, swa_status_t (*compute)(swa_call_t *), int32_t token)
{
    const int64_t vocab_size = swa_model_config(self->engine->model)->vocab_size;
    step_call_t *call = swa_call_new(sizeof *call, self->engine->n_threads, compute);
    PyArrayObject *logits = call ? swa_array_new(NPY_FLOAT32, 1, &vocab_size) : NULL;
    if (logits) {
        call->owner = self;
        call->token = token;
        call->logits = PyArray_DATA(logits);
        if (swa_call_run(&call->base, self->engine, NULL))
            Py_CLEAR(logits);
    }
    PyMem_RawFree(call);
    return (PyObject *)logits;
}

static PyObject *session_logits(session_t *self, PyObject *Py_UNUSED(unused))
{
    return session_call(self, compute_read, 0);
}

static PyObject *session_step(session_t *self, PyObject *argument)
{
    const int64_t vocab_size = swa_model_config(self->engine->model)->vocab_size;
    long long token = PyLong_AsLongLong(argument);
    if ((token == -1 && PyErr_Occurred()) || !swa_check_range("token", token, 0, vocab_size - 1))
        return NULL;
    return session_call(self, compute_step, (int32_t)token);
}

static PyMethodDef session_methods[] = {
    {"logits", (PyCFunction)session_logits, METH_NOARGS, "Logits after the last token."},
    {"step", (PyCFunction)session_step, METH_O, "Feed a token and return the logits after it."},
    {0},
};

static PyObject *session_n_tokens(session_t *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(atomic_load(&self->n_tokens));
}

static PyObject *session_kv_bytes(session_t *self, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(swa_session_kv_bytes(self->session));
}

static PyGetSetDef session_attributes[] = {
    {"n_tokens", (getter)session_n_tokens, NULL, "Tokens fed so far.", NULL},
    {"kv_bytes", (getter)session_kv_bytes, NULL, "Bytes of the KV cache.", NULL},
    {0},
};

static PyType_Slot session_slots[] = {
    {Py_tp_doc, "A KV cache and the tokens in it; Engine.start makes one."},
    {Py_tp_dealloc, session_dealloc},
    {Py_tp_methods, session_methods},
    {Py_tp_getset, session_attributes},
    {0, NULL},
};

PyType_Spec swa_session_spec = {
    .name = "swa._core.Session",
    .basicsize = sizeof(session_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = session_slots,
};
