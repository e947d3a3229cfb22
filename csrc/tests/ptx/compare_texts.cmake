# Fails unless the PTX texts ONE and OTHER differ in nothing but the architecture they are for.
foreach(name ONE OTHER)
  file(READ ${${name}} text)
  string(REGEX REPLACE "\n\\.target [^\n]*\n" "\n" text "${text}")
  # The name of a kernel has a number in it that is another one at every compilation.
  string(REGEX REPLACE "[0-9]+_GLOBAL__N__[0-9a-f_]+update_cuda_kernel_cu_[0-9a-f]+_[0-9]+" ""
    ${name}_text "${text}")
endforeach()
string(LENGTH "${ONE_text}" length)
if(length LESS 1000)
  message(FATAL_ERROR "expected a PTX text in ${ONE}, found ${length} characters")
elseif(NOT ONE_text STREQUAL OTHER_text)
  message(FATAL_ERROR "expected the same PTX in ${ONE} and ${OTHER}, found other instructions: "
    "give the second a row of its own (architecture_rows in CMakeLists.txt)")
endif()
