/* What the engine and its sessions share. */
#ifndef SWA_PYENGINE_H
#define SWA_PYENGINE_H

#include "pycore.h"

typedef struct {
    PyObject_HEAD
    swa_model_t *model;
    const char *dtype, *tier;
    int n_threads;
    atomic_bool finished; /* written by the worker */
} engine_t;

/* A Session that takes the engine's session over; NULL with an exception. */
PyObject *swa_wrap_session(engine_t *engine, swa_session_t **session);

#endif
