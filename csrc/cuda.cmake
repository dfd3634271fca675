# The target _cuda, where there is a CUDA compiler, and _cuda_emulator, its kernels on the host. GPUs are never probed
# here: everything is compiled for those architectures below that the compiler knows, and as PTX of the newest of them
# for later ones. A compiler that knows none of those asked for, being older than they are, compiles for all of ours.
set(LAYCA_CUDA "AUTO" CACHE STRING "The CUDA module: ON (it must be built), OFF, or AUTO (if there is a CUDA compiler)")
set(LAYCA_ALL_ARCHITECTURES 80 90 100 120)
set(LAYCA_CUDA_ARCHITECTURES ${LAYCA_ALL_ARCHITECTURES} CACHE STRING "The GPUs to compile the CUDA module for")

# One file per formula of the list in base_steps.h, so that they are compiled side by side.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS base_steps.h)
file(READ base_steps.h LAYCA_BASE_STEPS)
if(NOT LAYCA_BASE_STEPS MATCHES "using Formulas = FormulaList<([^;]*)>;")
  message(FATAL_ERROR "csrc/base_steps.h has no list of formulas: using Formulas = FormulaList<...>;")
endif()
string(REGEX MATCHALL "[A-Za-z0-9_]+(<[^>]*>)?" LAYCA_FORMULAS "${CMAKE_MATCH_1}")

# The sources of a module whose kernels are instantiated by `template`, in files that end in `suffix`.
function(layca_formula_sources template suffix result)
  foreach(LAYCA_FORMULA IN LISTS LAYCA_FORMULAS)
    string(MAKE_C_IDENTIFIER "${LAYCA_FORMULA}" name)
    set(file "${CMAKE_CURRENT_BINARY_DIR}/formulas/${name}${suffix}")
    configure_file("${template}" "${file}" @ONLY)
    list(APPEND sources "${file}")
  endforeach()
  set(${result} cuda/bindings.cpp cuda/registry.cpp cuda/runner.cpp cuda/launch.cpp ${sources} PARENT_SCOPE)
endfunction()

# All of the module, kernels and launches included, compiled by the host's compiler with what CUDA would bring.
layca_formula_sources(cuda/emulator/kernels.in .cpp LAYCA_EMULATOR_SOURCES)
set(LAYCA_EMULATOR_GPU cuda/emulator/blocks.cpp cuda/emulator/driver.cpp cuda/emulator/fibers.cpp)
pybind11_add_module(_cuda_emulator MODULE NO_EXTRAS EXCLUDE_FROM_ALL ${LAYCA_EMULATOR_GPU} ${LAYCA_EMULATOR_SOURCES})
target_compile_definitions(_cuda_emulator PRIVATE LAYCA_MODULE=_cuda_emulator)
target_include_directories(_cuda_emulator BEFORE PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}"
                                                         "${CMAKE_CURRENT_SOURCE_DIR}/cuda/emulator")
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  # Jumps between stacks are what glibc's checks of longjmp look for.
  set(LAYCA_EMULATOR_OPTIONS -O1 -U_FORTIFY_SOURCE -fno-math-errno -ffp-contract=off -Wall -Wextra)
  target_compile_options(_cuda_emulator PRIVATE ${LAYCA_EMULATOR_OPTIONS})
endif()

# Steps of the emulated GPU without Python, for a sanitizer that looks for races: not installed, built by tests/sanitize.
list(REMOVE_ITEM LAYCA_EMULATOR_SOURCES cuda/bindings.cpp)
add_executable(race_driver EXCLUDE_FROM_ALL cuda/emulator/race_driver.cpp ${LAYCA_EMULATOR_GPU} ${LAYCA_EMULATOR_SOURCES})
target_include_directories(race_driver BEFORE PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}"
                                                      "${CMAKE_CURRENT_SOURCE_DIR}/cuda/emulator")
target_compile_options(race_driver PRIVATE ${LAYCA_EMULATOR_OPTIONS})
if(LAYCA_SANITIZE STREQUAL "thread")
  # To the sanitizer the threads of the emulated GPU are the only ones: what makes them take turns is not looked at.
  set_source_files_properties(${LAYCA_EMULATOR_GPU} PROPERTIES COMPILE_OPTIONS -fno-sanitize=thread)
  target_compile_definitions(race_driver PRIVATE LAYCA_WATCH_THREADS)
endif()

if(LAYCA_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  set(LAYCA_CUDA "${CMAKE_CUDA_COMPILER}")
endif()
if(NOT LAYCA_CUDA)
  return()
endif()

# What the compiler is tried with; the module's own are set below, once it has said what it knows.
set(CMAKE_CUDA_ARCHITECTURES 80)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
foreach(wanted LAYCA_CUDA_ARCHITECTURES LAYCA_ALL_ARCHITECTURES)
  foreach(architecture IN LISTS ${wanted})
    if(known MATCHES "compute_${architecture}[ \r\n]")
      list(APPEND architectures ${architecture}-real)
      set(newest ${architecture})
    endif()
  endforeach()
  if(architectures)
    break()
  endif()
endforeach()

layca_formula_sources(cuda/formula.in .cu LAYCA_CUDA_SOURCES)
pybind11_add_module(_cuda MODULE NO_EXTRAS ${LAYCA_CUDA_SOURCES})
set_target_properties(_cuda PROPERTIES CUDA_ARCHITECTURES "${architectures};${newest}-virtual" CUDA_RUNTIME_LIBRARY Static)
target_compile_definitions(_cuda PRIVATE LAYCA_MODULE=_cuda)
target_include_directories(_cuda PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}" ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
# Whether a*b + c is fused is otherwise the compiler's choice, kernel by kernel, and rotate must make the step that
# measure made: Lion's, a sign, may hang on the last bit.
target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false>)
