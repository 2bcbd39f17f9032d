#pragma once

namespace conv2d_ext {

// Of the current device, `device`; once a process.
void load_kernels(int device);

}  // namespace conv2d_ext
