// Package seal encrypts and authenticates everything that rests: files in the bucket and on
// disks (Writer, Reader), stretches of WAL (SealWAL, OpenWAL) and a compute's local slots
// (Box). It is AES-256-GCM throughout, from the standard library, under keys that are each
// made for one object, with counters for nonces; what a ciphertext is for, and where in it a
// chunk belongs, is authenticated with it, so that it opens nowhere else (invariants K1, K3).
//
// # Sealed file, version 1
//
// Numbers are little-endian. A file is a header and one or more chunks; each chunk but the
// last holds exactly chunk-size bytes of plaintext, the last 1 to chunk-size, or none if the
// whole file is empty. So the plaintext's size follows from the file's.
//
//	offset  bytes  field
//	0       8      magic "HFSEALED"
//	8       2      version, 1
//	10      2      W, length of the wrapped DEK, 1..4096
//	12      4      C, chunk size in bytes of plaintext, 1024..1048576
//	16      W      wrapped DEK, as the key manager gave it
//	16+W    C+16   chunk 0: ciphertext, GCM tag
//	...     C+16   chunk 1 ...
//	...     L+16   last chunk
//
// A chunk's nonce is {1, 0, 0, 0} and its number (8 bytes, big-endian). Its AAD is
//
//	"holdfast file v1\n"  C (4)  context  chunk number (8)  1 if last, else 0 (1)
//
// and a context is "holdfast context v1\n" followed by purpose, project, branch and object, each
// after its length (2). Because of it: a chunk cannot change places or files, a file cannot
// be cut (the chunk that became the last one says it is not) or grow (the old last one says
// it is), and C cannot be changed. The wrapped DEK is not in it, so that a rotation may
// replace it. The DEK is bound to the same context by the key manager's wrap.
//
// Example: 20,000 bytes under a wrapped DEK of 96 bytes, with this package's chunk size of
// 16,384: header 16 + 96 = 112; chunk 0 16,384 + 16 = 16,400; chunk 1, the last,
// 3,616 + 16 = 3,632; the file has 20,144 bytes (SealedSize(20000, 96)).
//
// # Nonces
//
// A (key, nonce) pair must never seal twice. The first nonce byte tells files (1), WAL (2)
// and slots (3) apart. One Key takes one Writer, a Key takes WAL counters in rising order
// only, a key that was unwrapped rather than made (NewOpenKey) seals nothing, and a Box
// counts by itself.
package seal
