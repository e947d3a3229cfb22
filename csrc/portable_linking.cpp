// What glibc 2.32 and later tell a C++ library that asks whether the process has one thread, so
// that it may count references without atomic operations. An extension that asks glibc runs on no
// older one. This is the answer for this extension alone: "no", which is right for any process.
extern "C" {
extern char __libc_single_threaded __attribute__((visibility("hidden")));
char __libc_single_threaded = 0;
}
