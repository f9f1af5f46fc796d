# find_package(moe_ext): the target moe_ext::moe_ext, which is moe_ext.h, the operators, and ATen.
#
# The same file stands in the Python package, for the libraries beside it, and in what
# `cmake --install` makes, for those that CMake built.

include(CMakeFindDependencyMacro)
find_dependency(Torch)

if(EXISTS ${CMAKE_CURRENT_LIST_DIR}/moe_extTargets.cmake)
  include(${CMAKE_CURRENT_LIST_DIR}/moe_extTargets.cmake)
else()
  get_filename_component(package ${CMAKE_CURRENT_LIST_DIR}/.. ABSOLUTE)
  file(GLOB library ${package}/_C.*so)
  file(GLOB cuda_library ${package}/_C_cuda.*so)
  if(NOT library)
    set(moe_ext_FOUND FALSE)
    set(moe_ext_NOT_FOUND_MESSAGE
        "${package} has no compiled library; `python -m moe_ext doctor` says how to build it")
    return()
  endif()
  add_library(moe_ext::moe_ext SHARED IMPORTED)
  set_target_properties(moe_ext::moe_ext PROPERTIES
                        IMPORTED_LOCATION ${library}
                        INTERFACE_INCLUDE_DIRECTORIES ${package}/include)
  if(cuda_library)
    add_library(moe_ext::moe_ext_cuda SHARED IMPORTED)
    set_target_properties(moe_ext::moe_ext_cuda PROPERTIES IMPORTED_LOCATION ${cuda_library})
  endif()
endif()

target_compile_features(moe_ext::moe_ext INTERFACE cxx_std_20)
target_link_libraries(moe_ext::moe_ext INTERFACE ${TORCH_LIBRARIES})
if(TARGET moe_ext::moe_ext_cuda)
  target_link_libraries(moe_ext::moe_ext INTERFACE moe_ext::moe_ext_cuda)
  target_compile_definitions(moe_ext::moe_ext INTERFACE MOE_EXT_CUDA)
endif()
