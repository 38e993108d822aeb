// Command kubectl-quarry is the operator's view into a running Quarry: as
// "kubectl quarry" when it is on the PATH, or by itself.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/kube/reach"
)

// version is set by the linker.
var version = "dev"

const (
	endpointVariable = "QUARRY_ADMIN_ENDPOINT"
	defaultSocket    = "/run/quarry/admin.sock"
	defaultEndpoint  = "unix://" + defaultSocket
)

// The exit codes.
const (
	exitFailed      = 1 // the question could not be answered
	exitNeedsPerson = 2 // it was, and a person has to look
)

// needsPerson is an answer that a script should notice.
type needsPerson struct{ text string }

func (e needsPerson) Error() string { return e.text }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is main without the process.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot(&cli{out: stdout, err: stderr, now: time.Now})
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var person needsPerson
	switch {
	case err == nil:
		return 0
	case errors.As(err, &person):
		fmt.Fprintln(stderr, person.text)
		return exitNeedsPerson
	}
	fmt.Fprintln(stderr, "error:", err)
	return exitFailed
}

// cli is what the commands share.
type cli struct {
	out, err io.Writer
	now      func() time.Time
	endpoint string
	output   string
	cluster  reach.Flags
}

func newRoot(c *cli) *cobra.Command {
	root := &cobra.Command{
		Use:   "kubectl-quarry",
		Short: "Look into Quarry and mend it",
		Long: `Look into Quarry and mend it.

Which Quarry is asked, the first of these that is said or there:

  --admin-endpoint, or ` + endpointVariable + `: that socket;
  --kubeconfig, --context, --namespace or another of kubectl's flags: that cluster's;
  ` + defaultEndpoint + `: that of "quarry standalone" on this machine;
  KUBECONFIG, or kubectl's own file: that cluster's.

In a cluster the controller that leads is found by its labels and its Lease, and is
reached by a port-forward: with your own rights, which must allow to list its pods, to get
its Lease, and to get and create pods/portforward in its namespace.

Exit status: 0, done; 1, it could not be done; 2, it was done, and a person has to look.`,
		Annotations:       map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl quarry"},
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		PersistentPreRunE: func(*cobra.Command, []string) error { return c.check() },
	}
	root.SetOut(c.out)
	root.SetErr(c.err)
	root.PersistentFlags().StringVar(&c.endpoint, "admin-endpoint", "", "where Quarry answers: unix:///path, or tcp://ADDRESS:PORT of a loopback address")
	c.cluster.Bind(root.PersistentFlags())
	root.PersistentFlags().StringVarP(&c.output, "output", "o", "table", "table, wide, json or yaml")
	root.AddCommand(c.domainsCommand(), c.imagesCommand(), c.chainCommand(), c.operationsCommand(), c.usageCommand(),
		c.checkCommand(), c.fixCommand(), c.importCommand(), c.engineCommand(), c.versionCommand())
	return root
}

func (c *cli) check() error {
	switch c.output {
	case "table", "wide", "json", "yaml":
		return nil
	}
	return fault.New(fault.Invalid, "--output %q is not allowed: table, wide, json or yaml", c.output)
}

// place is a Quarry that can be asked.
type place struct {
	*admin.Client
	hint  string // what to do when nobody is there
	close func() error
}

// find decides which Quarry is asked, and finds it.
func (c *cli) find(ctx context.Context) (place, error) {
	endpoint := c.endpoint
	switch {
	case endpoint != "" && c.cluster.Given():
		return place{}, fault.New(fault.Invalid, "--admin-endpoint and the flags that choose a cluster exclude each other")
	case endpoint == "" && !c.cluster.Given():
		endpoint = os.Getenv(endpointVariable)
		if _, err := os.Lstat(defaultSocket); endpoint == "" && err == nil {
			endpoint = defaultEndpoint
		}
	}
	if endpoint == "" {
		controller, err := reach.Find(ctx, &c.cluster)
		if err != nil {
			return place{}, err
		}
		return place{Client: admin.NewClientOver(controller.String(), controller.Dial), close: controller.Close}, nil
	}
	e, err := admin.ParseLoopback(endpoint)
	if err != nil {
		return place{}, fmt.Errorf("--admin-endpoint: %w", err)
	}
	hint := "run this as root where quarry runs, name its socket with --admin-endpoint or " + endpointVariable + ", or a cluster with --context"
	return place{Client: admin.NewClient(e), hint: hint, close: func() error { return nil }}, nil
}

// ask calls Quarry and says what to do when nobody is there.
func ask[T any](ctx context.Context, c *cli, call func(*admin.Client) (T, error)) (out T, err error) {
	at, err := c.find(ctx)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, at.close()) }()
	out, err = call(at.Client)
	if errors.Is(err, fault.Unavailable) && at.hint != "" {
		err = fmt.Errorf("%w: %s", err, at.hint)
	}
	return out, err
}

func (c *cli) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Show the versions of this program and of Quarry", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			both := struct {
				Client admin.Version  `json:"client"`
				Server *admin.Version `json:"server,omitempty"`
			}{Client: admin.Version{Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}}
			server, err := ask(cmd.Context(), c, func(q *admin.Client) (admin.Version, error) { return q.Version(cmd.Context()) })
			if err == nil {
				both.Server = &server
			}
			text := fmt.Sprintf("Client: %s (%s, %s)\n", both.Client.Version, both.Client.Go, both.Client.Platform)
			if both.Server != nil {
				text += fmt.Sprintf("Server: %s (%s, %s) on node %s of installation %s\n", server.Version, server.Go, server.Platform, server.Node, server.Installation)
			}
			return errors.Join(c.print(both, func(io.Writer, bool) error { _, err := io.WriteString(c.out, text); return err }), err)
		},
	}
}
