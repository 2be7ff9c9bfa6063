# find_package(isoshard): the program as the target isoshard::isoshard, and ctest tests of
# checkpoints and of simulated runs. Needs no library and no language of the project that uses it.
#
#   isoshard_add_checkpoint_test(NAME n SOURCE folder [EQUALS folder])
#       n.whole  every file of SOURCE is there, undamaged and consistent   (isoshard verify)
#       n.equal  EQUALS holds the same state, bit for bit, whatever the shards (isoshard diff)
#   isoshard_add_simulation_test(NAME n [TOPOLOGIES text] [CASES n] [SEED n] [STEPS n]
#                                [FAULTS text])
#       runs on simulated ranks are the run on one rank, bit for bit       (isoshard simulate)
#   isoshard_add_golden_test(NAME n DIR folder)
#       the folder is what `isoshard golden` makes of its own description  (isoshard golden --check)
#
# Folders may be relative to the calling CMakeLists.txt. Tests have the label isoshard.

set(ISOSHARD_PROGRAM "${CMAKE_CURRENT_LIST_DIR}/../../../bin/isoshard")
get_filename_component(ISOSHARD_PROGRAM "${ISOSHARD_PROGRAM}" ABSOLUTE)
set(ISOSHARD_PYTHON_DIR "${CMAKE_CURRENT_LIST_DIR}/../../../share/isoshard")
get_filename_component(ISOSHARD_PYTHON_DIR "${ISOSHARD_PYTHON_DIR}" ABSOLUTE)
if(NOT EXISTS "${ISOSHARD_PROGRAM}")
  set(isoshard_FOUND FALSE)
  set(isoshard_NOT_FOUND_MESSAGE "the program is not at ${ISOSHARD_PROGRAM}")
  return()
endif()
if(NOT TARGET isoshard::isoshard)
  add_executable(isoshard::isoshard IMPORTED GLOBAL)
  set_target_properties(isoshard::isoshard PROPERTIES IMPORTED_LOCATION "${ISOSHARD_PROGRAM}")
endif()

# Reads the arguments of a function below into arg_…; what is missing or unknown ends the configure.
macro(isoshard_read_arguments function needed optional)
  cmake_parse_arguments(arg "" "${needed};${optional}" "" ${ARGN})
  if(arg_KEYWORDS_MISSING_VALUES)
    message(FATAL_ERROR "${function}(NAME ${arg_NAME}): no value: ${arg_KEYWORDS_MISSING_VALUES}")
  endif()
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR
      "${function}(NAME ${arg_NAME}): not understood: ${arg_UNPARSED_ARGUMENTS}; it takes "
      "${needed} ${optional}, each with one value (quote what has spaces or semicolons)")
  endif()
  if(NOT CMAKE_TESTING_ENABLED)
    message(WARNING
      "${function}(NAME ${arg_NAME}): call enable_testing() before, or ctest sees no test")
  endif()
  foreach(key ${needed})
    if(NOT DEFINED arg_${key})
      message(FATAL_ERROR "${function}: ${key} is missing")
    endif()
  endforeach()
endmacro()

function(isoshard_add_checkpoint_test)
  isoshard_read_arguments(isoshard_add_checkpoint_test "NAME;SOURCE" "EQUALS" ${ARGN})
  get_filename_component(source "${arg_SOURCE}" ABSOLUTE BASE_DIR "${CMAKE_CURRENT_SOURCE_DIR}")
  add_test(NAME ${arg_NAME}.whole COMMAND isoshard::isoshard verify "${source}")
  set_tests_properties(${arg_NAME}.whole PROPERTIES LABELS isoshard)
  if(DEFINED arg_EQUALS)
    get_filename_component(equals "${arg_EQUALS}" ABSOLUTE BASE_DIR "${CMAKE_CURRENT_SOURCE_DIR}")
    add_test(NAME ${arg_NAME}.equal COMMAND isoshard::isoshard diff "${source}" "${equals}")
    set_tests_properties(${arg_NAME}.equal PROPERTIES LABELS isoshard)
  endif()
endfunction()

function(isoshard_add_simulation_test)
  isoshard_read_arguments(isoshard_add_simulation_test "NAME" "TOPOLOGIES;CASES;SEED;STEPS;FAULTS"
                          ${ARGN})
  set(flags --no-progress)
  foreach(key TOPOLOGIES CASES SEED STEPS FAULTS)
    if(DEFINED arg_${key})
      string(TOLOWER "--${key}" flag)
      list(APPEND flags ${flag} "${arg_${key}}")
    endif()
  endforeach()
  add_test(NAME ${arg_NAME} COMMAND isoshard::isoshard simulate ${flags})
  set_tests_properties(${arg_NAME} PROPERTIES LABELS isoshard)
endfunction()

function(isoshard_add_golden_test)
  isoshard_read_arguments(isoshard_add_golden_test "NAME;DIR" "" ${ARGN})
  get_filename_component(folder "${arg_DIR}" ABSOLUTE BASE_DIR "${CMAKE_CURRENT_SOURCE_DIR}")
  add_test(NAME ${arg_NAME} COMMAND isoshard::isoshard golden --check "${folder}")
  set_tests_properties(${arg_NAME} PROPERTIES LABELS isoshard)
endfunction()
