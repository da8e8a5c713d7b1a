package walstore_test

import (
	"testing"

	"github.com/holdfastdb/holdfast/safekeeper/walstore"
	"github.com/holdfastdb/holdfast/safekeeper/walstore/walstoretest"
)

// hookFS calls hook at each Sync of a file.
type hookFS struct {
	*walstoretest.FS
	hook func()
}

type hookFile struct {
	walstore.File
	fs *hookFS
}

func (fs *hookFS) Open(name string, create bool) (walstore.File, error) {
	f, err := fs.FS.Open(name, create)
	if err != nil {
		return nil, err
	}
	return hookFile{f, fs}, nil
}

func (f hookFile) Sync() error {
	if f.fs.hook != nil {
		f.fs.hook()
	}
	return f.File.Sync()
}

// A batch that goes over several files becomes visible at its end. What is compacted
// meanwhile must not take the files along that hold it.
func TestCompactWhileABatchGoesOverFiles(t *testing.T) {
	for at := range 8 {
		fs := &hookFS{FS: walstoretest.New()}
		inner, err := walstore.Open(dir, []uint64{1, 2, 3}, walstore.Options{FS: fs, FileBytes: 8 << 10, CacheBytes: 1 << 10})
		if err != nil {
			t.Fatal(err)
		}
		s := &store{Store: inner, t: t, fs: fs.FS}
		s.put(1, 20, 1)
		syncs := 0
		fs.hook = func() {
			if syncs++; syncs-1 != at {
				return
			}
			fs.hook = nil
			if err := s.Compact(20, []byte("state")); err != nil {
				t.Error(err)
			}
		}
		s.put(21, 150, 1)
		fs.hook = nil
		if err := s.Compact(20, []byte("state")); err != nil {
			t.Fatal(err)
		}
		s.holds(21, 150, 1)
		fs.Kill()
		again, err := tryOpen(t, fs.FS)
		if err != nil {
			t.Fatalf("compacted at the batch's sync %d: %v", at, err)
		}
		again.holds(21, 150, 1)
	}
}
