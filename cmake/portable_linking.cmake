# Links an extension so that it also runs on systems older than the one that builds it, as a wheel
# for everyone must (manylinux_2_28: glibc 2.28 and the C++ library of GCC 8).
#
# A linker takes a function of glibc for its newest version, and then no older glibc will do, though
# the function is the same. Three things here would need new systems:
#   1. dlopen, pthread_once and others: glibc 2.34 moved them from libdl, libpthread and librt into
#      libc under a new version, and kept the old ones for programs that exist. The libraries made
#      here offer nothing but the old ones. They are seen by the linker alone: linked first, they
#      make this a program from before the move, which every glibc runs.
#   2. __libc_single_threaded, from glibc 2.32 on: see csrc/portable_linking.cpp.
#   3. the compiler's C++ library: linked into the extension, less what isn't used (of which
#      arc4random would need glibc 2.36). The unwinder stays shared: a process should have one.
# Nothing but Python's entry is exported, so that neither this C++ library nor torch's is taken for
# the other.

include(CheckCXXSourceCompiles)

# Functions that libc took over in glibc 2.34, of those that the CUDA runtime and this project call.
set(old_dl dlclose dlerror dlopen dlsym dlvsym)
set(old_pthread
  pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join
  pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy
  pthread_mutexattr_init pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once
  pthread_rwlock_destroy pthread_rwlock_init pthread_rwlock_rdlock pthread_rwlock_timedrdlock
  pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock pthread_rwlock_trywrlock
  pthread_rwlock_unlock pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init
  pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init
  pthread_spin_lock pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post
  sem_timedwait sem_trywait sem_wait)
set(old_rt shm_open shm_unlink)

function(link_portably target)
  file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/exports.map" "{ global: PyInit_${target}; local: *; };\n")
  target_sources(${target} PRIVATE csrc/portable_linking.cpp)
  target_link_options(${target} PRIVATE
    LINKER:--gc-sections LINKER:--version-script=${CMAKE_CURRENT_BINARY_DIR}/exports.map)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=libstdc++.a
    OUTPUT_VARIABLE static_library OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(EXISTS "${static_library}")
    target_link_options(${target} PRIVATE -static-libstdc++)
  endif()

  check_cxx_source_compiles("
    #include <features.h>
    #if !__GLIBC_PREREQ(2, 34)
    #error
    #endif
    int main() {}" EMA_FUSED_HAVE_GLIBC_2_34)
  # Of functions that glibc has had from its start on the architecture, and of a later one.
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    set(first GLIBC_2.2.5)
    set(later GLIBC_2.3.4)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    set(first GLIBC_2.17)
    set(later GLIBC_2.17)
  endif()
  if(EMA_FUSED_HAVE_GLIBC_2_34 AND first)
    add_old_library(old_dl libdl.so.2 ${old_dl} dlmopen=${later})
    add_old_library(old_pthread libpthread.so.0 ${old_pthread})
    add_old_library(old_rt librt.so.1 ${old_rt})
    add_dependencies(${target} old_dl old_pthread old_rt)
    # One option, or CMake drops repeated parts of it. Every glibc has all three.
    target_link_options(${target} PRIVATE "SHELL:-Wl,--push-state,--no-as-needed \
$<TARGET_FILE:old_dl> $<TARGET_FILE:old_pthread> $<TARGET_FILE:old_rt> -Wl,--pop-state")
  endif()
endfunction()

# A library that passes for `soname`: functions, each in the version `first` or as `name=version`.
function(add_old_library name soname)
  set(bodies "")
  set(versions "")
  foreach(entry IN LISTS ARGN)
    string(REGEX MATCH "^([a-z_]+)=?(.*)$" entry "${entry}")
    set(function "${CMAKE_MATCH_1}")
    set(version "${CMAKE_MATCH_2}")
    if(NOT version)
      set(version "${first}")
    endif()
    string(APPEND bodies "extern \"C\" void ${function}() {}\n")
    list(APPEND versions "${version}")
    list(APPEND of_${version} "${function}")
  endforeach()
  list(REMOVE_DUPLICATES versions)
  set(map "")
  foreach(version IN LISTS versions)
    list(JOIN of_${version} "; " functions)
    string(APPEND map "${version} { global: ${functions}; };\n")
  endforeach()
  set(base "${CMAKE_CURRENT_BINARY_DIR}/${name}")
  file(CONFIGURE OUTPUT "${base}.cpp" CONTENT "${bodies}")
  file(CONFIGURE OUTPUT "${base}.map" CONTENT "${map}")
  add_library(${name} SHARED "${base}.cpp")
  set_target_properties(${name} PROPERTIES CXX_VISIBILITY_PRESET default NO_SONAME ON
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/old_glibc")
  target_link_options(${name} PRIVATE
    -nostdlib LINKER:-soname=${soname} LINKER:--version-script=${base}.map)
endfunction()
