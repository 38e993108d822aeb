package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/test/process"
)

const (
	diskSize = 8 << 30
	nodeName = "demo"
	// patience is how long one CSI call may be repeated, as a sidecar would.
	patience = 2 * time.Minute
)

// place is one domain of the demo.
type place struct {
	domain     string // its name
	disk       string // what its disk is formatted with
	filesystem string // what is put inside its volumes
	path       string // where its disk is mounted
}

// quarry is the running binary, and what is known of it.
type quarry struct {
	*process.Quarry
	cli      string // kubectl-quarry
	node     string
	identity string
	startup  time.Duration
}

// startQuarry starts the binary and waits until Probe says that it is ready.
func startQuarry(ctx context.Context, bin, dir string, places []*place) (_ *quarry, err error) {
	var domains []string
	for _, p := range places {
		domains = append(domains, process.Domain(p.domain, p.path, ""))
	}
	run, err := process.New(process.Config{Binary: filepath.Join(bin, "quarry"), Dir: dir,
		Domains: process.DomainsFile(domains...), Node: nodeName, Installation: "demo"})
	if err != nil {
		return nil, err
	}
	q := &quarry{Quarry: run, cli: filepath.Join(bin, "kubectl-quarry")}
	begin := time.Now()
	if err := q.Start(ctx); err != nil {
		return nil, errors.Join(err, q.Close())
	}
	q.startup = time.Since(begin)
	defer func() {
		if err != nil {
			stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleaning)
			defer cancel()
			err = errors.Join(fmt.Errorf("%w\n%s", err, q.LastLog(30)), q.end(stopping))
		}
	}()
	info, err := q.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	if err != nil {
		return nil, err
	}
	q.identity = info.GetName() + " " + info.GetVendorVersion()
	node, err := q.NodeGetInfo(ctx, &csi.NodeGetInfoRequest{})
	if err != nil {
		return nil, err
	}
	q.node = node.GetNodeId()
	return q, nil
}

// end ends the process: politely, and after half of the time that is left not.
// That it had ended by itself is an error.
func (q *quarry) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, cleaning/2)
	defer cancel()
	return errors.Join(q.Stop(ctx), q.Close())
}

// call makes a CSI call, and repeats it as a sidecar does while the answer means
// "may still be running".
func call[Q, A any](ctx context.Context, method func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) (A, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		reply, err := method(ctx, request)
		switch status.Code(err) {
		case codes.Aborted, codes.Unavailable, codes.DeadlineExceeded:
		default:
			return reply, err
		}
		if wait > time.Second {
			fmt.Fprintf(os.Stderr, "      waiting: %s\n", status.Convert(err).Message())
		}
		select {
		case <-ctx.Done():
			return reply, err
		case <-time.After(wait):
		}
	}
}

// ask runs kubectl-quarry and returns what it printed.
func (q *quarry) ask(ctx context.Context, args ...string) (string, error) {
	return run(ctx, q.cli, append(args, "--admin-endpoint", q.AdminEndpoint())...)
}

// show runs kubectl-quarry and puts what it says on the screen. It fails when
// there is something that needs a person.
func (q *quarry) show(ctx context.Context, s *screen, args ...string) error {
	cmd := exec.CommandContext(ctx, q.cli, append(args, "--admin-endpoint", q.AdminEndpoint())...)
	text, err := cmd.CombinedOutput()
	s.table("kubectl quarry "+strings.Join(args, " "), string(text))
	if err != nil {
		return fmt.Errorf("kubectl-quarry %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// list asks kubectl-quarry for JSON.
func list[T any](ctx context.Context, q *quarry, what string) ([]T, error) {
	text, err := q.ask(ctx, what, "-o", "json")
	if err != nil {
		return nil, err
	}
	var out []T
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		return nil, fmt.Errorf("kubectl-quarry %s -o json: %w", what, err)
	}
	return out, nil
}

// images are all of them, hidden and dying ones too.
func (q *quarry) images(ctx context.Context) ([]admin.Image, error) {
	return list[admin.Image](ctx, q, "images")
}

// reasons prints what each domain does natively and what by default, and why.
func (q *quarry) reasons(ctx context.Context, s *screen) error {
	domains, err := list[admin.Domain](ctx, q, "domains")
	if err != nil {
		return err
	}
	for _, d := range domains {
		for _, note := range d.Notes {
			s.note("%s: %s", d.Name, note)
		}
	}
	return nil
}
