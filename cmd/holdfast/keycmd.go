package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

// newKey is the operator's side of the customer's key. Everything is asked of the key manager,
// at its socket, or of the manager, where DEKs have to be counted or wrapped again.
func newKey() *cobra.Command {
	group := newGroup("key", "States, revocation, receipts, versions and rotation of the customer's key")
	group.Long = `States, revocation, receipts, versions and rotation of the customer's key.

A key is the KEK, in all its versions, of a project or of one branch that has a key of its own. With one project
--project may be left out; --branch takes a branch's name or id. Each command with --json prints one stable
document of JSON, with the names of internal/api/pb/holdfast.proto.`
	f := &keyFlags{}
	flags := group.PersistentFlags()
	flags.StringVar(&f.project, "project", "", "id of the project (default: the only one)")
	flags.StringVar(&f.branch, "branch", "", "name or id of a branch with a key of its own (default: the project's key)")
	flags.BoolVar(&f.json, "json", false, "print JSON")
	flags.StringVar(&f.keymgr, "keymgr", "", "address of the key manager, unix:/path or loopback HOST:PORT (default: the one below --data)")
	flags.StringVar(&f.manager, "manager", "", "address of the manager (default: the one below --data)")
	_ = group.RegisterFlagCompletionFunc("project", f.completeProject) // fails only for a flag that is not there
	_ = group.RegisterFlagCompletionFunc("branch", f.completeBranch)
	group.AddCommand(newKeyStatus(f), newKeyRevoke(f), newKeyResume(f), newKeyGrace(f), newKeyReceipts(f),
		newKeyVersions(f), newKeyRotate(f), newKeyRotateCMK(f), newKeyChange(f), newKeyRetire(f), newKeyRehearse(f))
	return group
}

// keyFlags are the flags that all commands of the key have.
type keyFlags struct {
	project, branch string
	keymgr, manager string
	json            bool
}

// keyClient asks the roles.
type keyClient struct {
	flags   *keyFlags
	admin   pb.KeyAdminClient
	keys    pb.KeyManagerClient
	manager pb.ManagerClient
}

// with calls fn with clients of the key manager and the manager; limit bounds all of it.
func (f *keyFlags) with(cmd *cobra.Command, limit time.Duration, fn func(context.Context, *keyClient) error) error {
	keymgr, err := dialRole(cmd, "keymgr", f.keymgr)
	if err != nil {
		return err
	}
	defer keymgr.Close()
	manager, err := dialRole(cmd, "manager", f.manager)
	if err != nil {
		return err
	}
	defer manager.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), limit)
	defer cancel()
	return inWords(cmd, fn(ctx, &keyClient{flags: f, admin: pb.NewKeyAdminClient(keymgr), keys: pb.NewKeyManagerClient(keymgr),
		manager: pb.NewManagerClient(manager)}))
}

// ref is the key that the flags name.
func (c *keyClient) ref(ctx context.Context) (*pb.KeyRef, error) {
	list, err := c.admin.ListKeys(ctx, &pb.ListKeysRequest{})
	if err != nil {
		return nil, err
	}
	return c.refAmong(ctx, list.Keys)
}

// refAtOnce is ref without a word to the KMS, which may not answer: the manager knows the keys' names, too.
func (c *keyClient) refAtOnce(ctx context.Context) (*pb.KeyRef, error) {
	quick, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	list, err := c.manager.ListBranches(quick, &pb.ListBranchesRequest{})
	if err != nil {
		return c.ref(ctx)
	}
	var keys []*pb.KeyStatusResponse
	for _, b := range list.Branches {
		keys = append(keys, &pb.KeyStatusResponse{Key: b.Project})
		if b.OwnKey {
			keys = append(keys, &pb.KeyStatusResponse{Key: b.Project + "/" + b.Id})
		}
	}
	ref, err := c.refAmong(quick, keys)
	if err != nil {
		return c.ref(ctx) // of a key without a branch, or the same error
	}
	return ref, nil
}

// refAmong is the one of the keys that the flags name.
func (c *keyClient) refAmong(ctx context.Context, keys []*pb.KeyStatusResponse) (*pb.KeyRef, error) {
	project, err := pickProject(keys, c.flags.project)
	if err != nil || c.flags.branch == "" {
		return &pb.KeyRef{Project: project}, err
	}
	if hasKey(keys, project+"/"+c.flags.branch) {
		return &pb.KeyRef{Project: project, Branch: c.flags.branch}, nil
	}
	id, err := c.branchID(ctx, project)
	if err != nil {
		return nil, err
	}
	if !hasKey(keys, project+"/"+id) {
		// The key manager would take the project's key, and a slip of the hand would shut every branch.
		return nil, fmt.Errorf("branch %s has no key of its own: it is under the key of project %s; leave --branch out to act on that", c.flags.branch, project)
	}
	return &pb.KeyRef{Project: project, Branch: id}, nil
}

// branchID finds the branch that --branch names.
func (c *keyClient) branchID(ctx context.Context, project string) (string, error) {
	list, err := c.manager.ListBranches(ctx, &pb.ListBranchesRequest{})
	if err != nil {
		return "", fmt.Errorf("finding branch %s: %w", c.flags.branch, err)
	}
	for _, b := range list.Branches {
		if b.Project == project && (b.Name == c.flags.branch || b.Id == c.flags.branch) {
			return b.Id, nil
		}
	}
	return "", fmt.Errorf("project %s has no branch %q; `holdfast branch list` names them", project, c.flags.branch)
}

// projectOf is the project's part of a key's id.
func projectOf(key string) string {
	project, _, _ := strings.Cut(key, "/")
	return project
}

// refOf names the key of an id.
func refOf(key string) *pb.KeyRef {
	project, branch, _ := strings.Cut(key, "/")
	return &pb.KeyRef{Project: project, Branch: branch}
}

func hasKey(keys []*pb.KeyStatusResponse, id string) bool {
	return slices.ContainsFunc(keys, func(k *pb.KeyStatusResponse) bool { return k.Key == id })
}

// pickProject is the project that was asked for, or the only one.
func pickProject(keys []*pb.KeyStatusResponse, want string) (string, error) {
	projects := make(map[string]bool)
	for _, k := range keys {
		projects[projectOf(k.Key)] = true
	}
	names := strings.Join(slices.Sorted(maps.Keys(projects)), ", ")
	switch {
	case len(projects) == 0:
		return "", errors.New("the key manager knows no key yet: the first start of the manager makes one")
	case want != "" && !projects[want]:
		return "", fmt.Errorf("there is no project %q; there are: %s", want, names)
	case want != "":
		return want, nil
	case len(projects) > 1:
		return "", fmt.Errorf("there are several projects: choose one with --project: %s", names)
	}
	return names, nil
}

// completionLimit bounds what a Tab may take.
const completionLimit = 2 * time.Second

func (f *keyFlags) completeProject(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	var out []string
	_ = f.with(cmd, completionLimit, func(ctx context.Context, c *keyClient) error { // without an answer there is nothing to offer
		list, err := c.admin.ListKeys(ctx, &pb.ListKeysRequest{})
		for _, k := range list.GetKeys() {
			out = append(out, projectOf(k.Key))
		}
		return err
	})
	slices.Sort(out)
	return slices.Compact(out), cobra.ShellCompDirectiveNoFileComp
}

// completeBranch offers the branches that have keys of their own.
func (f *keyFlags) completeBranch(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	var out []string
	_ = f.with(cmd, completionLimit, func(ctx context.Context, c *keyClient) error {
		list, err := c.manager.ListBranches(ctx, &pb.ListBranchesRequest{})
		for _, b := range list.GetBranches() {
			if b.OwnKey {
				out = append(out, b.Name)
			}
		}
		return err
	})
	return out, cobra.ShellCompDirectiveNoFileComp
}
