# LibTorch::LibTorch: Debian's libtorch-dev (1.13), or the newer one in the PyPI wheel's `torch` folder that LibTorch_ROOT
# or CMAKE_PREFIX_PATH names (scripts/setup --cuda fetches one). No find_package(Torch): the wheel's would drag in CUDA.
#
# With HEARTH_CUDA also its CUDA half, and the machine's CUDA.

# A wheel's folder also holds headers of protobuf and others, which must not be found for those packages.
foreach(prefix ${CMAKE_PREFIX_PATH})
  if(EXISTS ${prefix}/lib/libtorch_cpu.so)
    set(LibTorch_ROOT ${prefix})
    list(REMOVE_ITEM CMAKE_PREFIX_PATH ${prefix})
    break()
  endif()
endforeach()

set(required LibTorch_CPU LibTorch_C10 LibTorch_INCLUDE_ROOT)
if(HEARTH_CUDA)
  list(APPEND required LibTorch_CUDA LibTorch_C10_CUDA)
endif()
# Never a mixture: nothing from elsewhere where there is a root, nothing remembered from another one.
set(only "")
if(LibTorch_ROOT)
  set(only NO_DEFAULT_PATH PATHS ${LibTorch_ROOT})
endif()
if(NOT "${LibTorch_ROOT}" STREQUAL "${LibTorch_SEARCHED}")
  foreach(variable ${required})
    unset(${variable} CACHE)
  endforeach()
endif()
set(LibTorch_SEARCHED "${LibTorch_ROOT}" CACHE INTERNAL "")
find_path(LibTorch_INCLUDE_ROOT NAMES torch/csrc/api/include/torch/torch.h torch/torch.h PATH_SUFFIXES include ${only})
find_library(LibTorch_CPU NAMES torch_cpu PATH_SUFFIXES lib ${only})
find_library(LibTorch_C10 NAMES c10 PATH_SUFFIXES lib ${only})
if(HEARTH_CUDA)
  find_library(LibTorch_CUDA NAMES torch_cuda PATH_SUFFIXES lib ${only})
  find_library(LibTorch_C10_CUDA NAMES c10_cuda PATH_SUFFIXES lib ${only})
endif()
# The wheel's own BLAS is slow on CPUs that are not Intel's: OpenBLAS is put in front of it.
find_library(LibTorch_BLAS NAMES libopenblas.so.0)
mark_as_advanced(LibTorch_INCLUDE_ROOT LibTorch_CPU LibTorch_C10 LibTorch_CUDA LibTorch_C10_CUDA LibTorch_BLAS)

set(LibTorch_VERSION "")
foreach(header torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
  if(LibTorch_INCLUDE_ROOT AND NOT LibTorch_VERSION AND EXISTS ${LibTorch_INCLUDE_ROOT}/${header})
    file(STRINGS ${LibTorch_INCLUDE_ROOT}/${header} version REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
    string(REGEX MATCHALL "[0-9]+" version "${version}")
    list(JOIN version "." LibTorch_VERSION)
  endif()
endforeach()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch REQUIRED_VARS ${required} VERSION_VAR LibTorch_VERSION)

if(LibTorch_FOUND AND NOT TARGET LibTorch::LibTorch)
  # The wheel's include folder also holds fmt and protobuf of its own, which would hide ours; only the four folders that
  # Torch's headers need are exposed, as symbolic links in the build tree.
  set(exposed ${CMAKE_BINARY_DIR}/torch-include)
  file(MAKE_DIRECTORY ${exposed})
  foreach(folder ATen c10 caffe2 torch)
    if(EXISTS ${LibTorch_INCLUDE_ROOT}/${folder})
      file(CREATE_LINK ${LibTorch_INCLUDE_ROOT}/${folder} ${exposed}/${folder} SYMBOLIC)
    endif()
  endforeach()
  add_library(LibTorch::LibTorch INTERFACE IMPORTED)
  target_include_directories(LibTorch::LibTorch SYSTEM INTERFACE ${exposed} ${exposed}/torch/csrc/api/include)
  get_filename_component(folder ${LibTorch_CPU} DIRECTORY)
  target_link_options(LibTorch::LibTorch INTERFACE -Wl,-rpath,${folder})
  if(LibTorch_VERSION VERSION_GREATER_EQUAL 2 AND LibTorch_BLAS)
    target_link_options(LibTorch::LibTorch INTERFACE "SHELL:-Wl,--no-as-needed ${LibTorch_BLAS} -Wl,--as-needed")
  endif()
  target_link_libraries(LibTorch::LibTorch INTERFACE ${LibTorch_CPU} ${LibTorch_C10})
  if(HEARTH_CUDA)
    find_package(CUDAToolkit REQUIRED)
    # Nothing of ours names torch_cuda's symbols: it registers itself. Its own libraries are found by the old kind of
    # rpath, which holds for libraries of libraries too.
    target_link_options(LibTorch::LibTorch INTERFACE
      "SHELL:-Wl,--no-as-needed ${LibTorch_CUDA} ${LibTorch_C10_CUDA} -Wl,--as-needed"
      -Wl,--disable-new-dtags -Wl,-rpath,${CUDAToolkit_LIBRARY_DIR})
    target_link_libraries(LibTorch::LibTorch INTERFACE CUDA::cudart)
  endif()
  if(LibTorch_VERSION VERSION_GREATER_EQUAL 2.12)
    set(CMAKE_CXX_STANDARD 20)
  endif()
endif()
