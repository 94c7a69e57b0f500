# hearth_library(NAME [APART FILE…] LINK …): one library a folder, of all its sources but programs (*_main.cc) and those
# that are APART: files behind a fence of their own (MPI, NCCL), which the folder's list makes a library by themselves.
# Each links what its includes name; PUBLIC and PRIVATE as for target_link_libraries.
function(hearth_library name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "APART;LINK")
  file(GLOB sources RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} CONFIGURE_DEPENDS *.cc)
  file(GLOB programs RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} *_main.cc)
  if(programs OR arg_APART)
    list(REMOVE_ITEM sources ${programs} ${arg_APART})
  endif()
  add_library(${name} STATIC ${sources})
  target_link_libraries(${name} ${arg_LINK} PRIVATE hearth_warnings)
endfunction()
