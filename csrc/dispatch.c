/* Which tiers were built, and which of them this CPU and operating system run: by CPUID and XCR0, never by name. */
#define _DEFAULT_SOURCE /* syscall */
#include <stdatomic.h>
#include <string.h>

#include "kernels.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define SWA_X86 1
#endif

#define MAYBE_UNUSED __attribute__((unused)) /* where the compiler lacks the tier */

/* ---- what the machine has ------------------------------------------------------------------------------------ */

#ifdef SWA_X86
enum { XCR0_YMM = 0x06, XCR0_ZMM = 0xe6, XCR0_TILES = 0x60000 }; /* register state that the operating system saves */

typedef struct {
    unsigned leaf1_ecx, leaf7_ebx, leaf7_edx, leaf7_1_eax, xcr0;
} cpu_t;

static cpu_t detect(void)
{
    cpu_t cpu = {0};
    unsigned eax, ebx, ecx, edx;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx))
        cpu.leaf1_ecx = ecx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        cpu.leaf7_ebx = ebx;
        cpu.leaf7_edx = edx;
        if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx))
            cpu.leaf7_1_eax = eax;
    }
    if (cpu.leaf1_ecx & bit_OSXSAVE) { /* else XGETBV is an illegal instruction */
        unsigned high;
        __asm__ volatile("xgetbv" : "=a"(cpu.xcr0), "=d"(high) : "c"(0));
    }
    return cpu;
}

static bool has(unsigned found, unsigned wanted) { return (found & wanted) == wanted; }

MAYBE_UNUSED static bool runs_avx2(void)
{
    cpu_t cpu = detect();
    return has(cpu.xcr0, XCR0_YMM) && has(cpu.leaf1_ecx, bit_AVX | bit_FMA | bit_F16C) && has(cpu.leaf7_ebx, bit_AVX2);
}

MAYBE_UNUSED static bool runs_avx512(void)
{
    cpu_t cpu = detect();
    return runs_avx2() && has(cpu.xcr0, XCR0_ZMM) &&
           has(cpu.leaf7_ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL);
}

MAYBE_UNUSED static bool runs_avx512_bf16(void)
{
    const unsigned avx512_bf16 = 1u << 5; /* cpuid.h of older compilers has no name for it */
    return runs_avx512() && has(detect().leaf7_1_eax, avx512_bf16);
}

#ifdef SWA_EMULATE_AMX /* a test build: tiles on any machine, the same question to the operating system */
static bool has_tiles(void) { return true; }
#else
MAYBE_UNUSED static bool has_tiles(void)
{
    const unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    cpu_t cpu = detect();
    return has(cpu.xcr0, XCR0_TILES) && has(cpu.leaf7_edx, amx_bf16 | amx_tile);
}
#endif

/* Linux gives a process tile registers only if it asks, and for good: until it replaces itself (exec), for its threads
 * and the children that it forks. It refuses where a thread's alternate signal stack could not hold them, and a filter
 * of system calls may forbid the question; without its consent a tile instruction kills the process. */
MAYBE_UNUSED static bool tiles_permitted(void)
{
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { UNKNOWN, GRANTED, REFUSED };
    static atomic_int answer;
    int known = atomic_load(&answer);
    if (known == UNKNOWN) { /* threads that ask at once get the same answer */
#ifdef SWA_EMULATE_AMX
        uint64_t supported;
        long refused = syscall(SYS_arch_prctl, 0x1021, &supported); /* ARCH_GET_XCOMP_SUPP */
#else
        long refused = syscall(SYS_arch_prctl, 0x1023, 18L); /* ARCH_REQ_XCOMP_PERM, the tiles' data */
#endif
        known = refused ? REFUSED : GRANTED;
        atomic_store(&answer, known);
    }
    return known == GRANTED;
#else
    return false;
#endif
}

MAYBE_UNUSED static bool runs_amx_bf16(void) { return runs_avx512_bf16() && has_tiles() && tiles_permitted(); }
#endif

static bool runs_anywhere(void) { return true; }

/* ---- the table ----------------------------------------------------------------------------------------------- */

static const struct {
    const swa_kernels_t *kernels;
    bool (*runs)(void);
} tiers[] = {
    {&swa_kernels_portable, runs_anywhere},
#ifdef SWA_HAVE_AVX2
    {&swa_kernels_avx2, runs_avx2},
#endif
#ifdef SWA_HAVE_AVX512
    {&swa_kernels_avx512, runs_avx512},
#endif
#ifdef SWA_HAVE_AVX512_BF16
    {&swa_kernels_avx512_bf16, runs_avx512_bf16},
#endif
#ifdef SWA_HAVE_AMX_BF16
    {&swa_kernels_amx_bf16, runs_amx_bf16},
#endif
};

enum { N_TIERS = sizeof tiers / sizeof *tiers };

int swa_tiers_built(const char *names[SWA_MAX_TIERS])
{
    _Static_assert(N_TIERS <= (int)SWA_MAX_TIERS, "raise SWA_MAX_TIERS");
    for (int i = 0; i < N_TIERS; i++)
        names[i] = tiers[i].kernels->name;
    return N_TIERS;
}

const swa_kernels_t *swa_kernels_find(const char *name)
{
    for (int i = N_TIERS - 1; i >= 0; i--)
        if ((!name || !strcmp(name, tiers[i].kernels->name)) && tiers[i].runs())
            return tiers[i].kernels;
    return NULL;
}

bool swa_tier_supported(const char *name) { return swa_kernels_find(name) != NULL; }

const char *swa_kernels_name(const swa_kernels_t *kernels) { return kernels->name; }
