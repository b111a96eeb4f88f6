// The C library's functions under the names that NVIDIA's libdevice has for them; exp2 and log2 are instructions.
#pragma once
#define exp2f __nvvm_ex2_approx_f
#define log2f __nvvm_lg2_approx_f
#define expf __nv_expf
#define exp10f __nv_exp10f
#define logf __nv_logf
#define log10f __nv_log10f
#define sinf __nv_sinf
#define cosf __nv_cosf
#define tanf __nv_tanf
#define asinf __nv_asinf
#define acosf __nv_acosf
#define atanf __nv_atanf
#define sinhf __nv_sinhf
#define coshf __nv_coshf
#define tanhf __nv_tanhf
#define asinhf __nv_asinhf
#define acoshf __nv_acoshf
#define atanhf __nv_atanhf
#define powf __nv_powf
#define fmodf __nv_fmodf
#define atan2f __nv_atan2f
#define nextafterf __nv_nextafterf
#define ldexpf __nv_ldexpf
#define frexpf __nv_frexpf
