#pragma once

#include <nanobind/nanobind.h>

// Adds `energy` for float32 and float64.
void bind_energy(nanobind::module_& module);
