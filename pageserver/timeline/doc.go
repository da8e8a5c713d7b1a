// Package timeline keeps the history of one branch: every version of every thing that its WAL
// describes, readable at any LSN of the history window. New versions go to an open layer in
// memory; a full one is frozen and becomes a sealed, immutable file in the bucket (package
// layer); compaction merges such files. The branch's manifest, one small document replaced by
// compare-and-swap, names the layers that count (invariant P2).
//
//	Put ─▶ open layer ─▶ frozen layers ─▶ L0 files ─▶ L1 files ───▶ L2 files
//	       (memory)      (memory)         all keys    one partition  one partition
//	                                                  changes        images, changes
//
// Reads go from left to right and stop at the first Image, Init or Tombstone. What the
// manifest holds is durable up to DurableLSN; the rest is read again from the safekeepers
// after a restart. The layer files' local copies hold the same sealed bytes as the bucket
// and may be deleted at any time.
//
// A folder of pages may be a copy of another one without a version of its own: see copies.go.
//
// The caller's duties, in order: Create or Open; put again from DurableLSN on; Put from one
// goroutine; Close. When the project's key is revoked the timeline drops all it holds and
// every call gives an error that wraps keyring.ErrRevoked; when another server has
// opened the branch, ErrSuperseded: then Close it, and Open again or leave it to the other.
package timeline
