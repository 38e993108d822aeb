package main

import (
	"context"
	"fmt"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/test/bench/rig"
)

// countCalls counts what each call of CSI asks of the server, in a domain that is otherwise at rest.
func countCalls(ctx context.Context, o options, engine string) error {
	return rig.Tested(ctx, func(t testing.TB) error {
		s := serve(t, engine)
		c := &counter{served: s, seen: map[string]*counted{}}
		q := s.quarry(t, o.bin)
		if err := until(ctx, "the domain to be mounted", func() (bool, error) {
			_, err := s.requests()
			return err == nil, nil
		}); err != nil {
			return err
		}
		for round := range o.rounds {
			if err := c.round(ctx, func(name string, size int64, snapshot string) (*volume, error) {
				return create(ctx, q, fmt.Sprint(name, round), size, snapshot)
			}); err != nil {
				return err
			}
		}
		return c.print(o.rounds)
	})
}

const atRest = "(a minute at rest, volume in use)"

// counter counts requests to a server by what they were made for.
type counter struct {
	*served
	names []string // in their order
	seen  map[string]*counted
}

// counted are the counts of one call: of each round, what it asked until it answered, and what followed.
type counted struct{ answered, later []requests }

// rest waits until the server is asked nothing any more, and returns what it was asked so far.
func (c *counter) rest(ctx context.Context) (requests, error) {
	const still = 3 * time.Second
	last, err := c.requests()
	if err != nil {
		return nil, err
	}
	since := time.Now()
	err = until(ctx, "requests to end", func() (bool, error) {
		now, err := c.requests()
		if now.sum() != last.sum() {
			last, since = now, time.Now()
		}
		return time.Since(since) >= still, err
	})
	return last, err
}

// count does something and counts what it asks for.
func (c *counter) count(ctx context.Context, name string, do func() error) error {
	unix.Sync() // what the volume's file system has yet to write would come at any time
	before, err := c.rest(ctx)
	if err != nil {
		return err
	}
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	at, err := c.requests()
	if err != nil {
		return err
	}
	after, err := c.rest(ctx)
	if err != nil {
		return err
	}
	if c.seen[name] == nil {
		c.names, c.seen[name] = append(c.names, name), &counted{}
	}
	n := c.seen[name]
	n.answered, n.later = append(n.answered, at.since(before)), append(n.later, after.since(at))
	return nil
}

// round is the life of a volume, a snapshot of it, and a clone of that.
func (c *counter) round(ctx context.Context, build func(name string, size int64, snapshot string) (*volume, error)) (err error) {
	var v, clone *volume
	var snapshot string
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"CreateVolume", func() (err error) { v, err = build("volume", gib, ""); return err }},
		{"ControllerPublishVolume", func() error { return v.attach(ctx) }},
		{"NodeStageVolume (makes the ext4) + NodePublishVolume", func() error { return v.mount(ctx) }},
		{"", func() error { return write(v.target, 1) }},
		{"CreateSnapshot, volume in use", func() (err error) { snapshot, err = v.snapshot(ctx, "snapshot-of-"+v.name); return err }},
		{atRest, func() error { return pause(ctx, time.Minute) }},
		{"CreateVolume, clone", func() (err error) { clone, err = build("clone", gib, snapshot); return err }},
		{"ControllerExpandVolume + NodeExpandVolume, in use", func() error { return v.expand(ctx, 2*gib) }},
		{"NodeUnpublishVolume + NodeUnstageVolume", func() error { return v.unmount(ctx) }},
		{"ControllerUnpublishVolume", func() error { return v.detach(ctx) }},
		{"DeleteSnapshot, two volumes on it", func() error { return removeSnapshot(ctx, v.q, snapshot) }},
		{"DeleteVolume, the clone", func() error { return clone.remove(ctx) }},
		{"DeleteVolume", func() error { return v.remove(ctx) }},
	} {
		switch {
		case step.name == "":
			err = step.do()
		case step.name == atRest && c.seen[atRest] != nil: // once is long enough
		default:
			err = c.count(ctx, step.name, step.do)
		}
		if err != nil {
			return err
		}
	}
	return c.has(ctx, 0)
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func (c *counter) print(rounds int) error {
	fmt.Printf("\nrequests to the server of %s for each call, medians of %d rounds; \"content\" are %v\n", c.engine, rounds, c.bulk)
	t := tabwriter.NewWriter(rig.Out(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "call\tuntil its answer\tof these content\tlater\tmost of those until its answer\tand later")
	for _, name := range c.names {
		answered, later := median(c.seen[name].answered), median(c.seen[name].later)
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t%s\t%s\n", name, answered.sum(), answered.sum(c.bulk...), later.sum(), answered.top(8), later.top(5))
	}
	return t.Flush()
}
