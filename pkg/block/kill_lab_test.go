package block

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/host"
)

// order is what a child process does until it is killed.
type order struct {
	What string // "attach", "switch", "merge", "stop", "grow", "detach", "pause"
	Spec Spec
	Kill int // before or after its n-th call that changes something
}

const orderEnv = "QUARRY_BLOCK_ORDER"

// TestMain also is the agent that is killed.
func TestMain(m *testing.M) {
	text := os.Getenv(orderEnv)
	if text == "" {
		os.Exit(m.Run())
	}
	var o order
	err := json.Unmarshal([]byte(text), &o)
	if err == nil {
		d := devices()
		d.kernel = &mortal{kernel: d.Host, left: o.Kill}
		err = o.obey(d)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func (o order) obey(d *Devices) error {
	switch o.What {
	case "attach":
		_, err := d.Attach(bg, o.Spec)
		return err
	case "switch":
		return d.Switch(bg, []Spec{o.Spec})
	case "merge":
		for {
			if m, err := d.Merge(bg, o.Spec.Slabs); err != nil || m.Done {
				return err
			}
			time.Sleep(5 * time.Millisecond)
		}
	case "pause": // and is killed
		_, err := d.Recover(bg)
		var list []Thin
		if err == nil {
			list, err = d.Thin(bg)
		}
		if err == nil {
			err = d.Pause(bg, list, "a test", false)
		}
		if err != nil {
			return err
		}
		fmt.Println("paused")
		select {}
	case "stop":
		return d.StopMerge(bg, o.Spec.Slabs[0].ID)
	case "grow", "detach":
		found, err := d.Find(bg, o.Spec.Owner)
		if err != nil {
			return err
		}
		for _, dev := range found {
			if o.What == "detach" {
				err = errors.Join(err, d.Detach(bg, dev))
			} else {
				_, e := d.Grow(bg, dev, o.Spec.Size)
				err = errors.Join(err, e)
			}
		}
		return err
	}
	return fmt.Errorf("order %q", o.What)
}

// mortal dies before or after a call that changes something.
type mortal struct {
	kernel
	left int
}

func (m *mortal) step() {
	if m.left--; m.left == 0 {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

func around[T any](m *mortal, f func() (T, error)) (T, error) {
	m.step()
	out, err := f()
	m.step()
	return out, err
}

func around0(m *mortal, f func() error) error {
	_, err := around(m, func() (struct{}, error) { return struct{}{}, f() })
	return err
}

func (m *mortal) CreateMapped(ctx context.Context, name, uuid string, readOnly bool, table []host.Target) (host.Mapped, error) {
	return around(m, func() (host.Mapped, error) { return m.kernel.CreateMapped(ctx, name, uuid, readOnly, table) })
}
func (m *mortal) LoadMapped(ctx context.Context, d host.Mapped, readOnly bool, table []host.Target) error {
	return around0(m, func() error { return m.kernel.LoadMapped(ctx, d, readOnly, table) })
}
func (m *mortal) ResumeMapped(ctx context.Context, d host.Mapped) error {
	return around0(m, func() error { return m.kernel.ResumeMapped(ctx, d) })
}
func (m *mortal) RemoveMapped(ctx context.Context, d host.Mapped) error {
	return around0(m, func() error { return m.kernel.RemoveMapped(ctx, d) })
}
func (m *mortal) SuspendAll(ctx context.Context, devices []host.Mapped, limit time.Duration) (*host.Suspension, error) {
	return around(m, func() (*host.Suspension, error) { return m.kernel.SuspendAll(ctx, devices, limit) })
}
func (m *mortal) AttachLoop(ctx context.Context, s host.LoopSpec) (host.Loop, error) {
	return around(m, func() (host.Loop, error) { return m.kernel.AttachLoop(ctx, s) })
}
func (m *mortal) GrowLoop(ctx context.Context, lp host.Loop, size int64) (host.Loop, error) {
	return around(m, func() (host.Loop, error) { return m.kernel.GrowLoop(ctx, lp, size) })
}
func (m *mortal) DetachLoop(ctx context.Context, lp host.Loop) error {
	return around0(m, func() error { return m.kernel.DetachLoop(ctx, lp) })
}

// perish has a child obey and says whether it was killed on the way.
func (r *rig) perish(what string, s Spec, kill int) bool {
	r.Helper()
	text, err := json.Marshal(order{what, s, kill})
	r.must(err)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), orderEnv+"="+string(text))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return true
	}
	if err != nil {
		r.Fatalf("%s: %v\n%s", what, err, out)
	}
	return false
}

// An agent is killed before and after each call that changes something, in each
// operation; a new one repeats the operation. The workload writes all the time.
// With the kernel's state lost, everything is built again from the slabs.
func TestAnAgentKilledAnywhere(t *testing.T) {
	for _, lost := range []bool{false, true} {
		t.Run(fmt.Sprintf("lost=%t", lost), func(t *testing.T) {
			r := newRig(t)
			const size = mib
			base := r.raw("base", size)
			dev := r.attach(spec(base))
			c := content{}
			r.write(dev.Path, c, 1, every(region, 3, size)...)
			w := r.writer(dev.Path)
			check := func(what string) {
				t.Helper()
				w.end()
				last, err := w.at()
				r.must(err)
				for u := range int64(region) {
					if back := (last + region - uint64(u)) % region; back < last {
						c[u] = last - back
					}
				}
				found, err := r.d.Find(bg, owner) // what was killed may have grown it
				r.must(err)
				r.verify(what, dev.Path, found[0].Size, c)
			}
			for kill, more := 1, true; more; kill++ {
				more = false
				begun := time.Now()
				over := r.layer(fmt.Sprint("over", kill), base.Size)
				larger := base.Size + 64*unit
				for _, op := range []struct {
					what  string
					slabs func() Spec
				}{
					{"switch", func() Spec { return spec(over, base) }},
					{"grow", func() Spec { r.enlarge(&over, larger); return spec(over, base) }},
					{"merge", func() Spec { r.enlarge(&base, larger); return spec(over, base) }},
					{"switch", func() Spec { return spec(base) }},
					{"detach", func() Spec { return spec(base) }},
					{"attach", func() Spec { return spec(base) }},
				} {
					s := op.slabs()
					what := fmt.Sprintf("%s, killed at %d", op.what, kill)
					if op.what == "detach" {
						check(what)
					}
					if r.perish(op.what, s, kill) {
						more = true
					} else {
						what += " not at all"
					}
					r.d = devices()
					if lost { // as nearly as a living kernel can
						if op.what != "detach" && op.what != "attach" {
							check("before " + what)
						}
						_, err := r.d.Recover(bg)
						r.must(err)
						all, err := r.d.All(bg)
						r.must(err)
						for _, dev := range all {
							r.detach(dev)
						}
						r.must(r.d.Collect(bg, "d"))
						again := s
						if op.what == "switch" && len(s.Slabs) == 1 {
							again = spec(over, base) // until it is done
						}
						if op.what == "grow" {
							again.Size = dev.Size
						}
						dev = r.attach(again)
						if op.what == "switch" && len(s.Slabs) == 1 {
							r.merge(again.Slabs...) // nobody remembers that it is empty
						}
					} else if _, err := r.d.Recover(bg); err != nil {
						t.Fatalf("%s: %v", what, err)
					}
					if tables := r.tables(); strings.Contains(tables, "suspended=true") {
						t.Fatalf("%s: left is\n%s", what, tables)
					}
					r.must(order{What: op.what, Spec: s}.obey(r.d))
					if op.what == "detach" {
						if left := r.left(); left != "" {
							t.Fatalf("%s: left is %s", what, left)
						}
						continue
					}
					found, err := r.d.Find(bg, owner)
					r.must(err)
					if len(found) != 1 || found[0].Size != s.Size {
						t.Fatalf("%s: found %+v, size %d", what, found, s.Size)
					}
					dev = found[0]
					if op.what == "attach" || lost {
						check(what)
						w = r.writer(dev.Path)
					}
					w.further(t)
				}
				r.must(os.Remove(over.Path))
				t.Logf("killed at %d: %s", kill, time.Since(begun))
			}
			check("at the end")
		})
	}
}
