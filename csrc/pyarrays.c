#include "pyarrays.h"

static int check_shape(PyArrayObject *array, const char *name, int n_dimensions, const int64_t *shape)
{
    if (PyArray_NDIM(array) != n_dimensions) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions; it must have %d", name, PyArray_NDIM(array),
                     n_dimensions);
        return -1;
    }
    for (int i = 0; i < n_dimensions; i++) {
        const int64_t length = PyArray_DIM(array, i);
        char axis[16] = "";
        if (n_dimensions > 1)
            PyOS_snprintf(axis, sizeof axis, "axis %d of ", i);
        if (shape[i] == SWA_ANY && length == 0)
            PyErr_Format(PyExc_ValueError, "%s%s is empty", axis, name);
        else if (shape[i] != SWA_ANY && length != shape[i])
            PyErr_Format(PyExc_ValueError, "%s%s has length %lld; it must have %lld", axis, name, (long long)length,
                         (long long)shape[i]);
        else
            continue;
        return -1;
    }
    return 0;
}

PyArrayObject *swa_array_copy(PyObject *object, const char *name, int typenum, int n_dimensions, const int64_t *shape)
{
    PyArray_Descr *wanted = PyArray_DescrFromType(typenum);
    if (!wanted)
        return NULL;
    if (!PyArray_Check(object) || !PyArray_EquivTypenums(PyArray_TYPE((PyArrayObject *)object), typenum)) {
        PyObject *found =
            PyArray_Check(object) ? (PyObject *)PyArray_DESCR((PyArrayObject *)object) : (PyObject *)Py_TYPE(object);
        PyErr_Format(PyExc_TypeError, "%s must be a NumPy array of %S, not %S", name, wanted, found);
        Py_DECREF(wanted);
        return NULL;
    }
    if (check_shape((PyArrayObject *)object, name, n_dimensions, shape)) {
        Py_DECREF(wanted);
        return NULL;
    }
    return (PyArrayObject *)PyArray_FromArray((PyArrayObject *)object, wanted, /* steals `wanted` */
                                              NPY_ARRAY_CARRAY | NPY_ARRAY_ENSURECOPY | NPY_ARRAY_ENSUREARRAY);
}

PyArrayObject *swa_int64_copy(PyObject *object, const char *name, int64_t length, int64_t least)
{
    PyArrayObject *array = swa_array_copy(object, name, NPY_INT64, 1, &length);
    if (!array)
        return NULL;
    const int64_t *values = PyArray_DATA(array);
    for (npy_intp i = 0; i < PyArray_DIM(array, 0); i++) {
        if (values[i] < least) {
            PyErr_Format(PyExc_ValueError, "%s[%zd] is %lld; it must be at least %lld", name, (Py_ssize_t)i,
                         (long long)values[i], (long long)least);
            Py_DECREF(array);
            return NULL;
        }
    }
    return array;
}

int swa_check_ids(PyArrayObject *ids, int64_t vocab_size)
{
    const int32_t *values = PyArray_DATA(ids);
    for (npy_intp i = 0; i < PyArray_DIM(ids, 0); i++) {
        if (values[i] < 0 || values[i] >= vocab_size) {
            PyErr_Format(PyExc_ValueError, "ids[%zd] is %d; token ids of this model are in [0, %lld)", (Py_ssize_t)i,
                         (int)values[i], (long long)vocab_size);
            return -1;
        }
    }
    return 0;
}

PyArrayObject *swa_array_new(int typenum, int n_dimensions, const int64_t *shape)
{
    npy_intp dimensions[NPY_MAXDIMS_LEGACY_ITERS];
    size_t count = 1;
    for (int i = 0; i < n_dimensions; i++) {
        dimensions[i] = shape[i];
        if (__builtin_mul_overflow(count, (size_t)shape[i], &count) || count > PTRDIFF_MAX / sizeof(double))
            return (PyArrayObject *)PyErr_NoMemory();
    }
    return (PyArrayObject *)PyArray_SimpleNew(n_dimensions, dimensions, typenum);
}

bool swa_check_range(const char *name, long long value, int64_t least, int64_t most)
{
    if (value >= least && value <= most)
        return true;
    PyErr_Format(PyExc_ValueError, "%s is %lld; it must be at least %lld and at most %lld", name, value,
                 (long long)least, (long long)most);
    return false;
}
