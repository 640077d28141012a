// One kernel of one source file: -DSOURCE_FILE='"linear.cu"' -DENTRY=linear, and the file's own macros.
#include "emulated.h"
//
#include SOURCE_FILE

static void call_entry(void** arguments) { emulator::call(ENTRY, arguments); }

extern "C" const char* run(unsigned x, unsigned y, unsigned cluster, unsigned threads, unsigned seed,
                           void** arguments) {
    return emulate<call_entry>(x, y, cluster, threads, shared_bytes, seed, arguments);
}
