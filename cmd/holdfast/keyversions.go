package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

// rotateTimeout bounds the re-wrapping of all DEKs of a project.
const rotateTimeout = 30 * time.Minute

// usesCommand is a command that ends with what still needs which version.
func (f *keyFlags) usesCommand(cmd *cobra.Command, call func(context.Context, *keyClient, *pb.KeyRef) (*pb.KeyUsesResponse, error)) *cobra.Command {
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return f.with(cmd, rotateTimeout, func(ctx context.Context, c *keyClient) error {
			ref, err := c.ref(ctx)
			if err != nil {
				return err
			}
			uses, err := call(ctx, c, ref)
			switch {
			case err != nil:
				return err
			case f.json:
				return printJSON(cmd.OutOrStdout(), uses)
			}
			return printUses(cmd.OutOrStdout(), time.Now(), uses)
		})
	}
	return cmd
}

func newKeyVersions(f *keyFlags) *cobra.Command {
	return f.usesCommand(&cobra.Command{
		Use: "versions", Short: "Show which versions of the CMK and of the KEK are still needed, and by what", Args: cobra.NoArgs,
		Long: `Show which versions of the CMK and of the KEK are still needed, and by what: every wrapped DEK of layers, WAL and secrets
is counted. A part that does not answer is named, and then no version is said to be free.`,
	}, func(ctx context.Context, c *keyClient, ref *pb.KeyRef) (*pb.KeyUsesResponse, error) {
		return c.manager.KeyUses(ctx, ref)
	})
}

func newKeyRotate(f *keyFlags) *cobra.Command {
	var finish bool
	cmd := f.usesCommand(&cobra.Command{
		Use: "rotate", Short: "Make a new version of the KEK and wrap every DEK under it", Args: cobra.NoArgs,
		Long: `Make a new version of the KEK and wrap every DEK under it, online. No data is read or written: only small documents are.
Interrupted, it is harmless: run it again with --finish, which makes no further version. The old version stays until
"holdfast key retire".`,
		Example: `  holdfast key rotate
  holdfast key rotate --finish`,
	}, func(ctx context.Context, c *keyClient, ref *pb.KeyRef) (*pb.KeyUsesResponse, error) {
		return c.manager.RotateKEK(ctx, &pb.ManagerRotateRequest{Key: ref, FinishOnly: finish})
	})
	cmd.Flags().BoolVar(&finish, "finish", false, "make no new version: finish what was interrupted")
	return cmd
}

func printUses(w io.Writer, now time.Time, u *pb.KeyUsesResponse) error {
	v := u.GetVersions()
	fmt.Fprintf(w, "key %s under CMK %s\n", v.GetKey(), v.GetCmk())
	if v.GetRotateEveryMs() > 0 {
		fmt.Fprintf(w, "a new version of the KEK is made every %v\n", time.Duration(v.RotateEveryMs)*time.Millisecond)
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "\nKEK VERSION\tMADE\tWRAPPED BY CMK\tCMK VERSION\tNEEDED BY")
	for _, k := range v.GetKeks() {
		made := "-"
		if k.CreatedUnixMs != 0 {
			made = moment(now, k.CreatedUnixMs)
		}
		fmt.Fprintf(tw, "%d\t%s\t%s\t%s\t%s\n", k.Version, made, k.Cmk, k.CmkVersion, neededBy(u, k.Version))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	for _, e := range u.Errors {
		fmt.Fprintf(w, "not known: %s\n", e)
	}
	fmt.Fprintln(w, "of the CMK needed, not to be destroyed: "+strings.Join(cmkVersions(v.GetKeks()), ", "))
	if u.Rewrapped > 0 || u.BytesWritten > 0 {
		fmt.Fprintf(w, "wrapped again: %d DEKs; %d bytes of documents were written, none of data\n", u.Rewrapped, u.BytesWritten)
	}
	for _, n := range u.MayBeRetired {
		fmt.Fprintf(w, "nothing needs version %d of the KEK: `holdfast key retire %d` destroys it\n", n, n)
	}
	return nil
}

// neededBy says what is wrapped under a version.
func neededBy(u *pb.KeyUsesResponse, version uint32) string {
	deks := make(map[string]int64)
	for _, use := range u.Uses {
		if use.KekVersion == version && use.Deks > 0 {
			deks[use.What] += use.Deks
		}
	}
	var words []string
	for what, n := range deks {
		words = append(words, fmt.Sprintf("%d DEKs of %s", n, what))
	}
	slices.Sort(words)
	if version == u.GetVersions().GetCurrent() {
		words = append([]string{"new DEKs"}, words...)
	}
	switch {
	case len(words) > 0:
		return strings.Join(words, ", ")
	case len(u.Errors) > 0:
		return "not known"
	}
	return "nothing"
}

// cmkVersions lists which versions of which CMKs wrap a KEK.
func cmkVersions(keks []*pb.KEKVersion) []string {
	var out []string
	for _, k := range keks {
		name := k.Cmk
		if k.CmkVersion != "" {
			name += " version " + k.CmkVersion
		}
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out
}

func newKeyRotateCMK(f *keyFlags) *cobra.Command {
	return f.rewrapCommand(&cobra.Command{
		Use: "rotate-cmk", Short: "Wrap the KEK under the CMK's newest version", Args: cobra.NoArgs,
		Long: `Wrap every version of the KEK under the CMK's newest version, online: for after the customer gave the CMK a new one. It costs a
few calls of the KMS for each version of the KEK. What the CMK's older versions are still needed for "holdfast key versions" tells.`,
	}, nil)
}

func newKeyChange(f *keyFlags) *cobra.Command {
	var to string
	cmd := f.rewrapCommand(&cobra.Command{
		Use: "change --cmk CMK", Short: "Move the key to another CMK, of the same or another provider", Args: cobra.NoArgs,
		Long: `Move the key to another CMK, of the same or another provider, online. The old CMK has to say yes once more; when the command is
done nothing needs it. The key manager must have both (kms: and cmks: of its configuration).`,
		Example: `  holdfast key change --cmk aws-kms:arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab
  holdfast key change --cmk vault:transit/keys/holdfast`,
	}, &to)
	cmd.Flags().StringVar(&to, "cmk", "", "the CMK that the key is to have, KIND:KEY")
	_ = cmd.MarkFlagRequired("cmk") // fails only for a flag that is not there
	return cmd
}

func (f *keyFlags) rewrapCommand(cmd *cobra.Command, to *string) *cobra.Command {
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if to != nil && *to == "" {
			return errors.New("--cmk names no CMK; `holdfast key rotate-cmk` is for the newest version of the one that the key has")
		}
		return f.with(cmd, callTimeout, func(ctx context.Context, c *keyClient) error {
			ref, err := c.ref(ctx)
			if err != nil {
				return err
			}
			req := &pb.RewrapRequest{Key: ref}
			if to != nil {
				req.Cmk = *to
			}
			v, err := c.admin.Rewrap(ctx, req)
			switch {
			case err != nil:
				return err
			case f.json:
				return printJSON(cmd.OutOrStdout(), v)
			}
			return printVersions(cmd.OutOrStdout(), v)
		})
	}
	return cmd
}

func printVersions(w io.Writer, v *pb.KeyVersionsResponse) error {
	fmt.Fprintf(w, "key %s under CMK %s; calls of the KMS: %d\n", v.Key, v.Cmk, v.KmsCalls)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "KEK VERSION\tWRAPPED BY CMK\tCMK VERSION\tUSED FOR NEW DEKS")
	for _, k := range v.Keks {
		fmt.Fprintf(tw, "%d\t%s\t%s\t%s\n", k.Version, k.Cmk, k.CmkVersion, yesNo(k.Version == v.Current))
	}
	return tw.Flush()
}

func newKeyRetire(f *keyFlags) *cobra.Command {
	return &cobra.Command{
		Use: "retire VERSION", Short: "Destroy a version of the KEK that nothing needs any more", Args: cobra.ExactArgs(1),
		Long: `Destroy a version of the KEK that nothing needs any more. Every part is asked first: while one does not answer, or anything is
wrapped under the version, it is refused.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := strconv.ParseUint(args[0], 10, 32)
			if err != nil {
				return fmt.Errorf("%q is no version of a KEK: want a number, as `holdfast key versions` shows", args[0])
			}
			return f.with(cmd, callTimeout, func(ctx context.Context, c *keyClient) error {
				v, err := c.retire(ctx, uint32(n))
				switch {
				case err != nil:
					return err
				case f.json:
					return printJSON(cmd.OutOrStdout(), v)
				}
				return printVersions(cmd.OutOrStdout(), v)
			})
		},
	}
}

func (c *keyClient) retire(ctx context.Context, version uint32) (*pb.KeyVersionsResponse, error) {
	ref, err := c.ref(ctx)
	if err != nil {
		return nil, err
	}
	uses, err := c.manager.KeyUses(ctx, ref)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(uses.MayBeRetired, version) {
		return nil, fmt.Errorf("version %d of the KEK cannot be destroyed: %s", version, whyKept(uses, version))
	}
	return c.admin.RetireKEK(ctx, &pb.RetireKEKRequest{Key: ref, Version: version})
}

func whyKept(u *pb.KeyUsesResponse, version uint32) string {
	known := slices.ContainsFunc(u.GetVersions().GetKeks(), func(k *pb.KEKVersion) bool { return k.Version == version })
	switch {
	case !known:
		return "there is no such version; `holdfast key versions` lists them"
	case len(u.Errors) > 0:
		return "what it is needed by is not known: " + strings.Join(u.Errors, "; ")
	case version == u.GetVersions().GetCurrent():
		return "it is the current one; `holdfast key rotate` makes another first"
	}
	return "it is needed by " + neededBy(u, version) + "; `holdfast key rotate --finish` wraps them again"
}
