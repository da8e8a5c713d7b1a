package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

// callTimeout bounds an operator's command; starting an endpoint is the longest.
const callTimeout = 2 * time.Minute

// withManager calls fn with a client of the cluster's manager.
func withManager(cmd *cobra.Command, fn func(context.Context, pb.ManagerClient) error) error {
	return withManagerFor(cmd, callTimeout, fn)
}

func withManagerFor(cmd *cobra.Command, limit time.Duration, fn func(context.Context, pb.ManagerClient) error) error {
	conn, err := dialRole(cmd, "manager", "")
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), limit)
	defer cancel()
	return inWords(cmd, fn(ctx, pb.NewManagerClient(conn)))
}

// dialRole makes a connection to a role: at addr or, if that is empty, at its socket below --data.
func dialRole(cmd *cobra.Command, role, addr string) (*grpc.ClientConn, error) {
	if addr != "" {
		return rpc.Dial(addr)
	}
	l, err := layoutOf(cmd)
	if err != nil {
		return nil, err
	}
	return rpc.Dial(l.socket(role))
}

// inWords makes a role's error one for the user.
func inWords(cmd *cobra.Command, err error) error {
	st, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	if st.Code() == codes.Unavailable && strings.Contains(err.Error(), "dial ") {
		l, layoutErr := layoutOf(cmd)
		if layoutErr != nil {
			return layoutErr
		}
		for _, flag := range []string{"keymgr", "manager"} {
			if f := cmd.Flags().Lookup(flag); f != nil && f.Changed {
				return fmt.Errorf("--%s %s, or a role below %s, does not answer: %s", flag, f.Value, l.dir, st.Message())
			}
		}
		if runs(l) {
			return fmt.Errorf("a role of the cluster over %s does not answer: %s", l.dir, st.Message())
		}
		return fmt.Errorf("no cluster is running over %s: start one with `holdfast up --data %s`", l.dir, l.dir)
	}
	return errors.New(grpcWords.ReplaceAllString(st.Message(), ""))
}

// runs tells whether one of the roles that commands ask is there: then another is missing, not the cluster.
func runs(l layout) bool {
	for _, role := range []string{"keymgr", "manager"} {
		if conn, err := net.DialTimeout("unix", strings.TrimPrefix(l.socket(role), "unix:"), time.Second); err == nil {
			conn.Close()
			return true
		}
	}
	return false
}

// grpcWords is what gRPC puts before the words of an error that was wrapped.
var grpcWords = regexp.MustCompile(`rpc error: code = \w+ desc = `)

func newPsql() *cobra.Command {
	return &cobra.Command{
		Use:   "psql [ENDPOINT] [-- ARGS]",
		Short: "Run psql against an endpoint (main), with the password it was made with",
		Example: `  holdfast psql
  holdfast psql -- -c 'SELECT version()'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, psqlArgs := "main", args
			if dash := cmd.ArgsLenAtDash(); dash != 0 && len(args) > 0 {
				if dash > 1 || dash < 0 && len(args) > 1 {
					return errors.New("psql takes one endpoint's name; arguments for psql itself follow --")
				}
				name, psqlArgs = args[0], args[1:]
			}
			var url, password string
			err := withManager(cmd, func(ctx context.Context, m pb.ManagerClient) error {
				e, err := findEndpoint(ctx, m, name)
				if err != nil {
					return err
				}
				if strings.HasPrefix(e.State, "key ") {
					return fmt.Errorf("endpoint %s: %s", name, e.Error)
				}
				if e.State != "running" {
					return fmt.Errorf("endpoint %s is %s; `holdfast endpoint start %s` starts it", name, e.State, name)
				}
				url = e.Url
				c, err := m.Credentials(ctx, &pb.EndpointRequest{Name: name})
				if err != nil {
					return err
				}
				password = c.Password
				return nil
			})
			if err != nil {
				return err
			}
			return runPsql(url, password, psqlArgs)
		},
	}
}

// runPsql hands the password over in a file that only this user can read and that is gone
// when psql ends: arguments and environments are visible to more.
func runPsql(url, password string, args []string) error {
	pass, err := os.CreateTemp(shmDir(), "holdfast-pgpass-")
	if err != nil {
		return err
	}
	defer os.Remove(pass.Name())
	escaped := strings.NewReplacer(`\`, `\\`, `:`, `\:`).Replace(password)
	if _, err := fmt.Fprintf(pass, "*:*:*:*:%s\n", escaped); err != nil {
		return err
	}
	if err := pass.Close(); err != nil {
		return err
	}
	program, err := exec.LookPath("psql")
	if err != nil {
		return fmt.Errorf("%w: install PostgreSQL's client programs (Debian, Ubuntu: apt-get install postgresql-client)", err)
	}
	// Ctrl-C is psql's, to cancel a query: it ends by itself when its input does.
	psql := exec.Command(program, append([]string{url}, args...)...)
	psql.Stdin, psql.Stdout, psql.Stderr = os.Stdin, os.Stdout, os.Stderr
	if os.Getenv("PGPASSWORD") == "" {
		psql.Env = append(os.Environ(), "PGPASSFILE="+pass.Name())
	}
	err = psql.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return &exitError{status: max(exit.ExitCode(), 1)}
	}
	return err
}

// shmDir is a folder in memory, or the usual one for temporary files.
func shmDir() string {
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		return "/dev/shm"
	}
	return ""
}

func findEndpoint(ctx context.Context, m pb.ManagerClient, name string) (*pb.Endpoint, error) {
	list, err := m.ListEndpoints(ctx, &pb.ListEndpointsRequest{})
	if err != nil {
		return nil, err
	}
	for _, e := range list.Endpoints {
		if e.Name == name {
			return e, nil
		}
	}
	return nil, fmt.Errorf("there is no endpoint %q; `holdfast endpoint list` names them", name)
}

func newEndpoint() *cobra.Command {
	group := newGroup("endpoint", "List, start, stop and kill endpoints")
	group.AddCommand(&cobra.Command{
		Use: "list", Short: "List the endpoints", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withManager(cmd, func(ctx context.Context, m pb.ManagerClient) error {
				list, err := m.ListEndpoints(ctx, &pb.ListEndpointsRequest{})
				if err != nil {
					return err
				}
				return printEndpoints(cmd.OutOrStdout(), list.Endpoints)
			})
		},
	})
	type call func(context.Context, pb.ManagerClient, *pb.EndpointRequest) (*pb.Endpoint, error)
	for _, c := range []struct {
		name, short string
		call        call
	}{
		{"start", "Start an endpoint and wait until it takes connections", func(ctx context.Context, m pb.ManagerClient, r *pb.EndpointRequest) (*pb.Endpoint, error) {
			return m.StartEndpoint(ctx, r)
		}},
		{"stop", "Shut an endpoint down", func(ctx context.Context, m pb.ManagerClient, r *pb.EndpointRequest) (*pb.Endpoint, error) {
			return m.StopEndpoint(ctx, r)
		}},
		{"kill", "SIGKILL an endpoint's agent and Postgres and delete its local folder", func(ctx context.Context, m pb.ManagerClient, r *pb.EndpointRequest) (*pb.Endpoint, error) {
			return m.KillEndpoint(ctx, r)
		}},
	} {
		r := &pb.EndpointRequest{}
		cmd := &cobra.Command{
			Use: c.name + " [NAME]", Short: c.short, Args: cobra.MaximumNArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				r.Name = "main"
				if len(args) == 1 {
					r.Name = args[0]
				}
				return withManager(cmd, func(ctx context.Context, m pb.ManagerClient) error {
					e, err := c.call(ctx, m, r)
					if err != nil {
						return err
					}
					return printEndpoints(cmd.OutOrStdout(), []*pb.Endpoint{e})
				})
			},
		}
		if c.name == "start" {
			cmd.Flags().StringArrayVar(&r.ResetSettings, "reset-setting", nil,
				"take a setting of ALTER SYSTEM back first, or all, where PostgreSQL does not start with it; may be repeated")
		}
		group.AddCommand(cmd)
	}
	return group
}

func printEndpoints(w io.Writer, endpoints []*pb.Endpoint) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "ENDPOINT\tSTATE\tEPOCH\tPID\tURL\tERROR")
	for _, e := range endpoints {
		fmt.Fprintf(tw, "%s\t%s\t%d\t%d\t%s\t%s\n", e.Name, e.State, e.Epoch, e.Pid, e.Url, e.Error)
	}
	return tw.Flush()
}

func newStatus() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "status", Short: "Show how the cluster is", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withManager(cmd, func(ctx context.Context, m pb.ManagerClient) error {
				st, err := m.ClusterStatus(ctx, &pb.ClusterStatusRequest{})
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd.OutOrStdout(), st)
				}
				return printStatus(cmd.OutOrStdout(), st)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printJSON(w io.Writer, m proto.Message) error {
	v, err := jsonOf(m)
	if err != nil {
		return err
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// jsonOf is a message as a value for package json: protojson varies its spaces on purpose, and a stable
// output is kinder to scripts.
func jsonOf(m proto.Message) (v any, err error) {
	data, err := protojson.MarshalOptions{EmitUnpopulated: true, UseProtoNames: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	err = json.Unmarshal(data, &v)
	return v, err
}

func printStatus(w io.Writer, st *pb.ClusterStatusResponse) error {
	if err := printEndpoints(w, st.Endpoints); err != nil {
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "\nSAFEKEEPER\tLEADER\tTERM\tDISK\tBRANCH ENDS")
	for _, s := range st.Safekeepers {
		var leader, term uint64
		if len(s.Groups) > 0 {
			leader, term = s.Groups[0].Leader, s.Groups[0].Term
		}
		var ends []string
		for _, b := range s.Branches {
			ends = append(ends, pg.LSN(b.EndLsn).String())
		}
		fmt.Fprintf(tw, "%d\t%d\t%d\t%d MiB\t%s\n", s.NodeId, leader, term, s.DiskBytes>>20, strings.Join(ends, " "))
	}
	fmt.Fprintln(tw, "\nPAGESERVER BRANCH\tINGESTED\tDURABLE\tLAYERS\tLAYER BYTES\tERROR")
	for _, b := range st.GetPageserver().GetBranches() {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%d MiB\t%s\n", b.Branch, pg.LSN(b.IngestedLsn), pg.LSN(b.DurableLsn), b.Layers, b.LayerBytes>>20, b.Error)
	}
	var keys []*pb.KeyStatusResponse
	for _, k := range st.Keys {
		keys = append(keys, k.Status)
	}
	if len(keys) > 0 {
		fmt.Fprintln(tw)
		if err := tw.Flush(); err != nil {
			return err
		}
		if err := printKeyTable(w, time.Now(), keys); err != nil {
			return err
		}
	}
	for _, e := range st.Errors {
		fmt.Fprintf(tw, "\nnot answering: %s\n", e)
	}
	return tw.Flush()
}
