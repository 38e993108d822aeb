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
)

// version is set by the linker.
var version = "dev"

const (
	endpointVariable = "QUARRY_ADMIN_ENDPOINT"
	defaultEndpoint  = "unix:///run/quarry/admin.sock"
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
}

func newRoot(c *cli) *cobra.Command {
	root := &cobra.Command{
		Use:   "kubectl-quarry",
		Short: "Look into Quarry and mend it",
		Long: `Look into Quarry and mend it.

Quarry answers on its admin socket, which only its owner (root) may use. Where
that is, is said by --admin-endpoint, else by ` + endpointVariable + `, else it is
` + defaultEndpoint + `. Run this on the machine, or in the pod, where
"quarry standalone" runs: finding Quarry's pods by itself comes in a later version.

Exit status: 0, done; 1, it could not be done; 2, it was done, and a person has to look.`,
		Annotations:       map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl quarry"},
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		PersistentPreRunE: func(*cobra.Command, []string) error { return c.check() },
	}
	root.SetOut(c.out)
	root.SetErr(c.err)
	endpoint := os.Getenv(endpointVariable)
	if endpoint == "" {
		endpoint = defaultEndpoint
	}
	root.PersistentFlags().StringVar(&c.endpoint, "admin-endpoint", endpoint, "where Quarry answers: unix:///path")
	root.PersistentFlags().StringVarP(&c.output, "output", "o", "table", "table, wide, json or yaml")
	root.AddCommand(c.domainsCommand(), c.imagesCommand(), c.chainCommand(), c.operationsCommand(),
		c.checkCommand(), c.fixCommand(), c.engineCommand(), c.versionCommand())
	return root
}

func (c *cli) check() error {
	switch c.output {
	case "table", "wide", "json", "yaml":
		return nil
	}
	return fault.New(fault.Invalid, "--output %q is not allowed: table, wide, json or yaml", c.output)
}

func (c *cli) client() (*admin.Client, error) {
	e, err := admin.ParseEndpoint(c.endpoint)
	if err != nil {
		return nil, fmt.Errorf("--admin-endpoint: %w", err)
	}
	return admin.NewClient(e), nil
}

// ask calls Quarry and says what to do when nobody is there.
func ask[T any](c *cli, call func(*admin.Client) (T, error)) (T, error) {
	client, err := c.client()
	if err != nil {
		var none T
		return none, err
	}
	out, err := call(client)
	if errors.Is(err, fault.Unavailable) {
		err = fmt.Errorf("%w: run this as root where quarry runs, or name its socket with --admin-endpoint or %s", err, endpointVariable)
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
			server, err := ask(c, func(q *admin.Client) (admin.Version, error) { return q.Version(cmd.Context()) })
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
