// Package layer is the file format of a branch's immutable layers: versions of things in the
// order of their keys, then LSNs, in compressed blocks that are found through an index,
// the whole inside one sealed file (package seal). A lookup opens one block of about
// 32 KiB; a filter tells for most keys that are absent that no block need be opened.
//
// # Layer file, version 1
//
// This is the plaintext; the seal authenticates every byte and its place, so there are no
// checksums here. Numbers are little-endian, keys are 18 bytes (package keyspace).
//
//	+--------+---------+     +---------+-------+--------+------------+---------+
//	| header | block 0 | ... | block n | index | filter | properties | trailer |
//	+--------+---------+     +---------+-------+--------+------------+---------+
//
//	header      8  magic "HFLAYER\n"     2  version, 1     6  zero
//	block       1  codec: 0 stored, 1 S2     then the block in it:
//	              entry 0 ... entry n-1     4 n  their offsets     4  n, at least 1
//	entry      18  key     8  LSN     1  kind, not 0     the data, up to the next entry
//	index      for each block (42):
//	           18  key of its first entry     8  LSN of that     8  offset of the block
//	            4  its size in the file     4  its size decompressed
//	filter     Bloom filter of the keys: 10 bits for each key, 7 probes (see filter.go)
//	properties 18  first key     18  last key     8  least LSN     8  greatest LSN
//	            8  entries     8  keys     8  bytes of data
//	trailer     8  offset of the index     4  number of blocks     4  bytes of filter
//	            2  version, 1     6  zero     8  magic "HFLAYER\n"
//
// Versions of one key at one LSN keep the order in which they were added. An empty layer is
// not written.
//
// Example: two keys with a version each, of 5 and 3 bytes of data: header 16; block 1 + (27+5) +
// (27+3) + 2*4 + 4 = 75, stored since S2 does not shrink it; index 42; filter 8 (its least
// size); properties 76; trailer 32: together 249 bytes, before sealing.
package layer
