/* NumPy arrays in and out of the engine. */
#ifndef SWA_PYARRAYS_H
#define SWA_PYARRAYS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>

#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL swa_numpy_api
#ifndef SWA_IMPORT_NUMPY /* pymodule.c alone imports the table */
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

enum { SWA_ANY = -1 };

/* A private, contiguous copy of an array, which no other thread can change while the engine reads it. TypeError: not an
 * array of exactly this dtype. ValueError: not of this shape (SWA_ANY: any length of at least 1). */
PyArrayObject *swa_array_copy(PyObject *object, const char *name, int typenum, int n_dimensions, const int64_t *shape);

/* A one-dimensional swa_array_copy of int64 values, none below `least`. */
PyArrayObject *swa_int64_copy(PyObject *object, const char *name, int64_t length, int64_t least);

/* Checks that every token id (int32) is in [0, vocab_size): ValueError naming the first that is not. */
int swa_check_ids(PyArrayObject *ids, int64_t vocab_size);

/* Whether least <= value <= most; else ValueError naming the argument. */
bool swa_check_range(const char *name, long long value, int64_t least, int64_t most);

/* A new array with undefined contents; MemoryError also where its size overflows. */
PyArrayObject *swa_array_new(int typenum, int n_dimensions, const int64_t *shape);

#endif
