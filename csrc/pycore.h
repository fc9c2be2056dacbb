/* What the files of the extension module share. */
#ifndef SWA_PYCORE_H
#define SWA_PYCORE_H

#include "pyarrays.h"
#include "pyrun.h"
#include "swa.h"

typedef struct {
    PyObject *engine_type, *session_type;
} swa_state_t;

extern PyType_Spec swa_engine_spec;    /* pyengine.c */
extern PyType_Spec swa_session_spec;   /* pysession.c */
extern PyMethodDef swa_hook_methods[]; /* pyhooks.c */

/* The tier of this name; NULL: the one that the environment variable SWA_TIER names, else the best that this machine
 * supports. NULL with ValueError listing the supported tiers. */
const swa_kernels_t *swa_tier_from_name(const char *name);

/* 0, or -1 with ValueError. */
int swa_dtype_from_name(const char *name, swa_dtype_t *dtype);

/* The number of threads to use; 0 asks for the default. -1 with ValueError. */
int swa_threads_from_number(long long number);

/* Names of the tiers built in, or of those that this machine supports as well. */
PyObject *swa_tier_names(bool supported_only);

#endif
