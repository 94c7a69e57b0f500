# LibTorch::LibTorch, from Debian's libtorch-dev (1.13) or from any newer one that CMAKE_PREFIX_PATH leads to, the PyPI
# wheel's `torch` folder included. No find_package(Torch): the wheel's would drag in CUDA and its bundled headers.
#
# The wheel's include folder also holds fmt and protobuf of its own, which would hide ours; only the four folders that
# Torch's headers need are exposed, as symbolic links in the build tree.
find_path(LibTorch_INCLUDE_ROOT NAMES torch/csrc/api/include/torch/torch.h torch/torch.h PATH_SUFFIXES include)
find_library(LibTorch_CPU NAMES torch_cpu PATH_SUFFIXES lib)
find_library(LibTorch_C10 NAMES c10 PATH_SUFFIXES lib)
mark_as_advanced(LibTorch_INCLUDE_ROOT LibTorch_CPU LibTorch_C10)

set(LibTorch_VERSION "")
if(LibTorch_INCLUDE_ROOT AND EXISTS ${LibTorch_INCLUDE_ROOT}/torch/csrc/api/include/torch/version.h)
  file(STRINGS ${LibTorch_INCLUDE_ROOT}/torch/csrc/api/include/torch/version.h version REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
  string(REGEX MATCHALL "[0-9]+" version "${version}")
  list(JOIN version "." LibTorch_VERSION)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch REQUIRED_VARS LibTorch_CPU LibTorch_C10 LibTorch_INCLUDE_ROOT VERSION_VAR LibTorch_VERSION)

if(LibTorch_FOUND AND NOT TARGET LibTorch::LibTorch)
  set(exposed ${CMAKE_BINARY_DIR}/torch-include)
  file(MAKE_DIRECTORY ${exposed})
  foreach(folder ATen c10 caffe2 torch)
    if(EXISTS ${LibTorch_INCLUDE_ROOT}/${folder})
      file(CREATE_LINK ${LibTorch_INCLUDE_ROOT}/${folder} ${exposed}/${folder} SYMBOLIC)
    endif()
  endforeach()
  add_library(LibTorch::LibTorch INTERFACE IMPORTED)
  target_include_directories(LibTorch::LibTorch SYSTEM INTERFACE ${exposed} ${exposed}/torch/csrc/api/include)
  target_link_libraries(LibTorch::LibTorch INTERFACE ${LibTorch_CPU} ${LibTorch_C10})
  get_filename_component(folder ${LibTorch_CPU} DIRECTORY)
  target_link_options(LibTorch::LibTorch INTERFACE -Wl,-rpath,${folder})
  if(LibTorch_VERSION VERSION_GREATER_EQUAL 2.12)
    set(CMAKE_CXX_STANDARD 20)
  endif()
endif()
