/* The extension module swa._core: initialisation, what was built, and what this machine supports. */
#define SWA_IMPORT_NUMPY
#include "pycore.h"

#include "parallel.h"

#if defined(__clang__)
#define COMPILER "clang " __clang_version__
#else
#define COMPILER "gcc " __VERSION__
#endif

#ifdef _OPENMP
#define HAS_OPENMP Py_True
#else
#define HAS_OPENMP Py_False
#endif

enum { MAX_THREADS = 1024 };

PyObject *swa_tier_names(bool supported_only)
{
    const char *names[SWA_MAX_TIERS];
    int n = swa_tiers_built(names), kept = 0;
    for (int i = 0; i < n; i++)
        if (!supported_only || swa_tier_supported(names[i]))
            names[kept++] = names[i];
    PyObject *tuple = PyTuple_New(kept);
    for (int i = 0; tuple && i < kept; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (!name)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, name);
    }
    return tuple;
}

const swa_kernels_t *swa_tier_from_name(const char *name)
{
    const char *origin = "tier";
    const char *forced = getenv("SWA_TIER");
    if (!name && forced && *forced) {
        name = forced;
        origin = "the environment variable SWA_TIER";
    }
    const swa_kernels_t *kernels = swa_kernels_find(name);
    PyObject *supported = kernels ? NULL : swa_tier_names(true);
    if (supported)
        PyErr_Format(PyExc_ValueError, "%s is '%s'; this machine supports %R", origin, name, supported);
    Py_XDECREF(supported);
    return kernels;
}

int swa_dtype_from_name(const char *name, swa_dtype_t *dtype)
{
    if (strcmp(name, "bfloat16") && strcmp(name, "float32")) {
        PyErr_Format(PyExc_ValueError, "dtype is '%s'; it must be bfloat16 or float32", name);
        return -1;
    }
    *dtype = strcmp(name, "bfloat16") ? SWA_FLOAT32 : SWA_BFLOAT16;
    return 0;
}

int swa_threads_from_number(long long number)
{
    if (number < 0 || number > MAX_THREADS) {
        PyErr_Format(PyExc_ValueError, "num_threads is %lld; it must be 1 to %d, or 0 for the default", number,
                     MAX_THREADS);
        return -1;
    }
    return number ? (int)number : swa_default_threads();
}

static PyObject *build_info(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    const swa_kernels_t *kernels = swa_tier_from_name(NULL);
    PyObject *built = kernels ? swa_tier_names(false) : NULL;
    PyObject *supported = built ? swa_tier_names(true) : NULL;
    PyObject *info = NULL;
    if (supported)
        info = Py_BuildValue("{s:s,s:s,s:s,s:O,s:O,s:O,s:s,s:i}", "version", SWA_VERSION, "compiler", COMPILER, "flags",
                             SWA_BUILD_FLAGS, "openmp", HAS_OPENMP, "tiers_built", built, "tiers_supported", supported,
                             "tier", swa_kernels_name(kernels), "num_threads", swa_default_threads());
    Py_XDECREF(built);
    Py_XDECREF(supported);
    return info;
}

static PyObject *stop_worker(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Py_BEGIN_ALLOW_THREADS
    swa_worker_stop();
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "How the extension was built, and what it found on this machine."},
    {"_stop_worker", stop_worker, METH_NOARGS, "Cancel every call and end the worker thread; atexit calls it."},
    {0},
};

static int stop_worker_at_exit(PyObject *module)
{
    PyObject *atexit = PyImport_ImportModule("atexit");
    PyObject *stop = PyObject_GetAttrString(module, "_stop_worker");
    PyObject *result = atexit && stop ? PyObject_CallMethod(atexit, "register", "O", stop) : NULL;
    Py_XDECREF(result);
    Py_XDECREF(stop);
    Py_XDECREF(atexit);
    return result ? 0 : -1;
}

static PyObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type && PyModule_AddType(module, (PyTypeObject *)type))
        Py_CLEAR(type);
    return type;
}

static int execute(PyObject *module)
{
    import_array1(-1);
    swa_state_t *state = PyModule_GetState(module);
    if (!(state->engine_type = add_type(module, &swa_engine_spec)) ||
        !(state->session_type = add_type(module, &swa_session_spec)) ||
        PyModule_AddFunctions(module, swa_hook_methods) || PyModule_AddIntConstant(module, "NO_FLIP", SWA_NO_FLIP))
        return -1;
    return stop_worker_at_exit(module);
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    swa_state_t *state = PyModule_GetState(module);
    Py_VISIT(state->engine_type);
    Py_VISIT(state->session_type);
    return 0;
}

static int clear(PyObject *module)
{
    swa_state_t *state = PyModule_GetState(module);
    Py_CLEAR(state->engine_type);
    Py_CLEAR(state->session_type);
    return 0;
}

static void free_module(void *module) { clear(module); }

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "swa._core",
    .m_doc = "The engine of swa: weights, attention policies and runs in C.",
    .m_size = sizeof(swa_state_t),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = free_module,
};

PyMODINIT_FUNC PyInit__core(void);

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
