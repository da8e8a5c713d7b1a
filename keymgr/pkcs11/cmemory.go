//go:build cgo

package pkcs11

// #include <stdlib.h>
//
// // Overwrites what this thread freed last: the allocator gives blocks of a size out again in reverse order.
// static void overwrite_freed(void) {
//   enum { sizes = 32, each = 8 };
//   void *blocks[sizes * each];
//   int n = 0;
//   for (int size = 1; size <= sizes; size++)
//     for (int i = 0; i < each; i++) {
//       void *p = malloc(size * 16 - 8);
//       if (p == NULL) continue;
//       // Through a volatile pointer: a compiler may leave out writes to what is freed next.
//       volatile unsigned char *v = p;
//       for (int j = 0; j < size * 16 - 8; j++) v[j] = 0xa5;
//       blocks[n++] = p;
//     }
//   while (n > 0) free(blocks[--n]);
// }
import "C"

// overwriteFreed overwrites small blocks of C memory that were freed on this thread, to which the
// caller is locked: the binding copies what the library decrypts there, and frees it as it is.
func overwriteFreed() { C.overwrite_freed() }
