/* Which tiers were built, and which of them this CPU and operating system run: by CPUID and XCR0, never by name. */
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define SWA_X86 1
#endif

#define MAYBE_UNUSED __attribute__((unused)) /* where the compiler lacks the tier */

/* ---- what the machine has ------------------------------------------------------------------------------------ */

#ifdef SWA_X86
enum { XCR0_YMM = 0x06, XCR0_ZMM = 0xe6 }; /* register state that the operating system saves */

typedef struct {
    unsigned leaf1_ecx, leaf7_ebx, leaf7_1_eax, xcr0;
} cpu_t;

static cpu_t detect(void)
{
    cpu_t cpu = {0};
    unsigned eax, ebx, ecx, edx;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx))
        cpu.leaf1_ecx = ecx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        cpu.leaf7_ebx = ebx;
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
