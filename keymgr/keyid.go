package keymgr

import (
	"fmt"
	"strings"
)

// keyID names a key: the KEK, in all its versions, of a project or of one branch that has its
// own. Leases, checks of the CMK, revocations and receipts are each of one key.
type keyID struct {
	project string
	branch  string // empty: the project's own key
}

const maxName = 64

// String is the key's name in calls: PROJECT or PROJECT/BRANCH.
func (id keyID) String() string {
	if id.branch == "" {
		return id.project
	}
	return id.project + "/" + id.branch
}

// parseKeyID undoes String.
func parseKeyID(name string) keyID {
	project, branch, _ := strings.Cut(name, "/")
	return keyID{project, branch}
}

// folder is where the bucket has what is of the key.
func (id keyID) folder() string {
	if id.branch == "" {
		return "projects/" + id.project + "/"
	}
	return "projects/" + id.project + "/branches/" + id.branch + "/"
}

// document is the object with the wrapped KEKs.
func (id keyID) document() string { return id.folder() + "keys.json" }

// context is bound into the wraps of the key's KEK.
func (id keyID) context(version uint32) EncryptionContext {
	return EncryptionContext{Project: id.project, Branch: id.branch, KEKVersion: version}
}

// words names the key in errors and logs.
func (id keyID) words() string {
	if id.branch == "" {
		return "project " + id.project
	}
	return "branch " + id.branch + " of project " + id.project
}

// check keeps hostile ids out of object keys and logs.
func (id keyID) check() error {
	if err := checkName("project", id.project); err != nil {
		return err
	}
	if id.branch == "" {
		return nil
	}
	return checkName("branch", id.branch)
}

func checkName(what, name string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("%s id %.80q has %d bytes, want 1..%d", what, name, len(name), maxName)
	}
	for _, c := range []byte(name) {
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-') {
			return fmt.Errorf("%s id %q: want only [a-z0-9-]", what, name)
		}
	}
	return nil
}
