// The kernels for any machine: 16-byte vectors.
#include <cstdint>
#include <new>

#include "../api.h"
#include "../threads.h"

#define RK_VBYTES 16
#if defined(__aarch64__)
#define RK_REGISTERS 32
#else
#define RK_REGISTERS 16
#endif

namespace rnnkern {
namespace baseline {
#include "../generic/every-inl.h"
}  // namespace baseline
}  // namespace rnnkern

namespace rnnkern {
static bool supported() { return true; }
extern const Kernels kBaseline = {
    "baseline", supported, baseline::forward, baseline::backward, baseline::stepper, baseline::attention, nullptr};
}  // namespace rnnkern
