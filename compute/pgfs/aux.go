package pgfs

import (
	"fmt"
	"time"

	"github.com/holdfastdb/holdfast/internal/auxfile"
)

// auxTimeout bounds how long a rename may wait for Config.Aux, which may need Postgres: the
// kernel holds the directory meanwhile.
const auxTimeout = 10 * time.Second

// moved is a file that a rename, its own or its directory's, is about to give another path.
type moved struct {
	f        *file
	old, new string
}

// keepAux makes durable what a rename does to files that WAL does not describe: those that
// get a name under which they have to be, and those that lose one. A rename that cannot be
// fails here already: the log would tell of what did not happen.
func (fs *FS) keepAux(op opContext, from *node, oldName string, to *node, newName string, noReplace bool) error {
	if fs.cfg.Aux == nil {
		return nil
	}
	files, err := fs.movedFiles(from, oldName, to, newName, noReplace)
	if err != nil {
		return err
	}
	var changes []auxfile.Change
	for _, m := range files {
		switch {
		case auxfile.Carried(m.new):
			content := make([]byte, min(m.f.size.Load(), auxfile.MaxContent+1))
			read, err := fs.read(op, m.f, content, 0)
			if err != nil {
				return err
			}
			changes = append(changes, auxfile.Change{Path: m.new, Content: content[:read]})
		case auxfile.Carried(m.old):
			changes = append(changes, auxfile.Change{Path: m.old, Removed: true})
		}
	}
	return fs.tellAux(op, changes)
}

func (fs *FS) movedFiles(from *node, oldName string, to *node, newName string, noReplace bool) ([]moved, error) {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	n, old, err := movableLocked(fs.root, from, oldName, to, newName, noReplace)
	if err != nil || old == n { // nothing moves
		return nil, err
	}
	oldPath, newPath := from.dir.join(oldName), to.dir.join(newName)
	if n.file != nil {
		return []moved{{n.file, oldPath, newPath}}, nil
	}
	if n.dir == nil {
		return nil, nil
	}
	var files []moved
	for name, child := range n.dir.children {
		if child.file != nil {
			files = append(files, moved{child.file, oldPath + "/" + name, newPath + "/" + name})
		}
	}
	return files, nil
}

// dropAux makes durable that a file which WAL does not describe loses its name, if it can.
func (fs *FS) dropAux(op opContext, parent *node, name string, isDir bool) error {
	if fs.cfg.Aux == nil {
		return nil
	}
	path, err := fs.removedFile(parent, name, isDir)
	if err != nil || !auxfile.Carried(path) {
		return err
	}
	return fs.tellAux(op, []auxfile.Change{{Path: path, Removed: true}})
}

// removedFile gives a file's path; none for what is no file.
func (fs *FS) removedFile(parent *node, name string, isDir bool) (string, error) {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	n, err := childLocked(parent, name)
	if err == nil {
		err = removableLocked(n, isDir)
	}
	if err != nil || n.file == nil {
		return "", err
	}
	return parent.dir.join(name), nil
}

func (fs *FS) tellAux(op opContext, changes []auxfile.Change) error {
	if len(changes) == 0 {
		return nil
	}
	ctx, stop := fs.begin(op, auxTimeout)
	defer stop()
	if err := fs.cfg.Aux(ctx, changes); err != nil {
		return fmt.Errorf("%s could not be made durable, so its change is refused: %w", changes[0].Path, err)
	}
	return nil
}
