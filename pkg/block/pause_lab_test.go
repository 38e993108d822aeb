package block

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// thin are the names of the thin devices.
func (r *rig) thin() []Thin {
	r.Helper()
	list, err := r.d.Thin(bg)
	r.must(err)
	return list
}

// pause pauses all thin devices.
func (r *rig) pause() {
	r.Helper()
	r.must(r.d.Pause(bg, r.thin(), "a test", false))
	if len(r.d.Paused()) == 0 {
		r.Fatal("nothing is paused")
	}
}

// refused wants work on what is paused to fail so.
func (r *rig) refused(what string, err error) {
	r.Helper()
	if !errors.Is(err, fault.Exhausted) || !strings.Contains(err.Error(), "a test") {
		r.Errorf("%s: %v", what, err)
	}
}

func TestAPausedLayerTakesNothingUntilItGoesOn(t *testing.T) {
	r := newRig(t)
	const size = 4 * mib
	base := r.raw("base", size)
	dev := r.attach(spec(base))
	c := content{}
	r.write(dev.Path, c, 1, every(region, 3, size)...)
	if list := r.thin(); len(list) > 0 {
		t.Errorf("without layers: %+v", list)
	}
	before := r.d.Changes()
	over := r.layer("over", size)
	r.change(over, base)
	reader := r.reader("reader", over, base)
	list := r.thin()
	if len(list) != 1 || list[0].File != over.Path || r.d.Changes() == before {
		t.Fatalf("thin are %+v", list)
	}
	w := r.writer(dev.Path)
	w.further(t)
	r.pause()
	from, _ := w.at()
	for end := time.Now().Add(SuspendLimit + 2*time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		r.must(r.d.Keep(bg))
	}
	if to, err := w.at(); to > from+1 || err != nil { // one was written, and not yet acknowledged
		t.Fatalf("beyond the limit the writer went from %d to %d, %v", from, to, err)
	}
	if n := len(r.d.Paused()); n != 1 {
		t.Fatalf("%d are paused", n)
	}
	found, err := r.d.Find(bg, owner)
	r.must(err)
	if found[0].Paused != "a test" {
		t.Errorf("the device says %q", found[0].Paused)
	}
	next := r.layer("next", size)
	_, err = r.d.Attach(bg, spec(over, base))
	r.refused("attached again", err)
	r.refused("switched", r.d.Switch(bg, []Spec{spec(next, over, base)}))
	_, err = r.d.Merge(bg, []Slab{over, base})
	r.refused("merged", err)
	larger := over
	r.enlarge(&larger, 2*size)
	_, err = r.d.Grow(bg, dev, 2*size)
	r.refused("grown", err)
	if tables := r.tables(); strings.Count(tables, "suspended=true") != 1 {
		t.Errorf("after refusals there are\n%s", tables)
	}
	r.must(r.d.Unpause(r.d.Paused()))
	w.further(t)
	r.detach(reader)

	// What somebody else resumes is forgotten, and may be paused again.
	r.pause()
	left, err := r.d.Host.ResumeLeft(bg, uuidPrefix)
	r.must(err)
	r.must(r.d.Keep(bg))
	if n := len(r.d.Paused()); n != 0 || len(left) != 1 {
		t.Errorf("%d are paused, %d were", n, len(left))
	}
	w.further(t)
	r.pause()
	r.must(r.d.Unpause(r.d.Paused()))
	w.further(t)
	w.end()
	last, err := w.at()
	r.must(err)
	for u := range int64(region) {
		if back := (last + region - uint64(u)) % region; back < last {
			c[u] = last - back
		}
	}
	r.verify("the image", dev.Path, size, c)
}

func TestAPausedDeviceIsWrittenOutAndTakenDown(t *testing.T) {
	r := newRig(t)
	const size = 4 * mib
	base, over := r.raw("base", size), r.layer("over", size)
	dev := r.attach(spec(over, base))
	r.pause()
	f, err := os.OpenFile(dev.Path, os.O_RDWR, 0) // in memory only
	r.must(err)
	c := content{}
	for u := int64(3); u < size/unit/2; u += 5 { // the rest has no space
		c[u] = 7
		_, err := f.WriteAt(pattern(aligned(unit), u, 7), u*unit) // whole pages: nothing is read
		r.must(err)
	}
	found, err := r.d.Find(bg, owner)
	r.must(err)
	done, err := r.d.Let(found[0])
	r.must(err)
	r.must(r.d.Pause(bg, r.thin(), "a test", false)) // not what was let
	r.must(f.Close())
	if len(r.d.Paused()) > 0 {
		t.Error("what was let is paused")
	}
	r.must(r.d.Pause(bg, r.thin(), "a test", true))
	if len(r.d.Paused()) != 1 {
		t.Error("what has to be paused at once is not")
	}
	done()
	unavailable := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "a test") || len(r.d.Paused()) != 1 {
			t.Errorf("%s: %v; %d are paused", what, err, len(r.d.Paused()))
		}
	}
	_, err = r.d.Let(found[0])
	unavailable("let", err)
	unavailable("detached", r.d.Detach(bg, found[0]))
	r.must(r.d.Pause(bg, r.thin(), "a test", false))
	r.detach(found[0])
	if left := r.left(); left != "" {
		t.Errorf("left is %s", left)
	}
	r.must(r.d.Keep(bg))
	if n := len(r.d.Paused()); n > 0 {
		t.Errorf("%d that are gone are paused", n)
	}
	dev = r.attach(spec(over, base))
	r.verify("attached again", dev.Path, size, c)
}

func TestAPausedMergeStopsAndGoesOn(t *testing.T) {
	r := newRig(t)
	const size = 64 * mib
	base, over := r.raw("base", size), r.layer("over", size)
	dev := r.attach(spec(over, base))
	c := content{}
	r.write(dev.Path, c, 2, every(0, 4*per, size)...)
	chain := []Slab{over, base}
	begun, err := r.d.Merge(bg, chain)
	r.must(err)
	if begun.Done {
		t.Fatal("it was too fast for this test")
	}
	list := r.thin()
	if len(list) != 1 || list[0].File != base.Path {
		t.Fatalf("a merge writes the base; thin are %+v", list)
	}
	r.pause()
	stored := r.stored(over)
	_, err = r.d.Merge(bg, chain)
	r.refused("asked how far it is", err)
	time.Sleep(time.Second)
	if now := r.stored(over); now != stored {
		t.Errorf("it goes on: %d chunks, then %d", stored, now)
	}
	r.must(r.d.StopMerge(bg, over.ID))
	if tables := r.tables(); strings.Contains(tables, "snapshot-merge") || strings.Contains(tables, "suspended=true") {
		t.Errorf("stopped, there is\n%s", tables)
	}
	r.verify("stopped", dev.Path, size, c)
	r.merge(chain...)
	r.verify("merged", dev.Path, size, c)
}

// What has to be paused at once stays so, whoever asks how often that a merge is stopped.
func TestAMergeWithoutSpaceIsNotStopped(t *testing.T) {
	r := newRig(t)
	const size = 64 * mib
	base, over := r.raw("base", size), r.layer("over", size)
	dev := r.attach(spec(over, base))
	c := content{}
	r.write(dev.Path, c, 2, every(0, 4*per, size)...)
	begun, err := r.d.Merge(bg, []Slab{over, base})
	r.must(err)
	if begun.Done {
		t.Fatal("it was too fast for this test")
	}
	list := r.thin()
	r.must(r.d.Pause(bg, list, "a test", false))
	r.must(r.d.Pause(bg, list, "now at once", true))
	stored := r.stored(over)
	for range 3 {
		if err := r.d.StopMerge(bg, over.ID); !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "now at once") {
			t.Errorf("stopped: %v", err)
		}
	}
	if now := r.stored(over); now != stored || len(r.d.Paused()) != 1 {
		t.Errorf("it goes on: %d chunks, then %d; %d are paused", stored, now, len(r.d.Paused()))
	}
	// When there is space, what is paused does not merge once more to be stopped.
	r.must(r.d.Pause(bg, list, "a test", false))
	k := &recorder{kernel: r.d.Host}
	r.d.kernel = k
	r.must(r.d.StopMerge(bg, over.ID))
	r.d.kernel = nil
	if now := r.stored(over); now != stored || slices.Contains(k.log, "suspend") {
		t.Errorf("it went on: %d chunks, then %d: %v", stored, now, k.log)
	}
	r.verify("stopped", dev.Path, size, c)
	r.merge(over, base)
	r.verify("merged", dev.Path, size, c)
}

// late is a kernel in which something happens just before and after a suspend.
type late struct {
	kernel
	before, after func()
}

func (k *late) SuspendAll(ctx context.Context, m []host.Mapped, limit time.Duration) (*host.Suspension, error) {
	if k.before != nil {
		k.before()
	}
	s, err := k.kernel.SuspendAll(ctx, m, limit)
	if k.after != nil {
		k.after()
	}
	return s, err
}

func TestWhatIsBeingPausedIsKnown(t *testing.T) {
	r := newRig(t)
	const size = 4 * mib
	base, over := r.raw("base", size), r.layer("over", size)
	dev := r.attach(spec(over, base))
	w := r.writer(dev.Path)
	found, err := r.d.Find(bg, owner)
	r.must(err)
	done := func() {}
	r.d.kernel = &late{kernel: r.d.Host, before: func() {
		if done, err = r.d.Let(found[0]); err != nil {
			t.Error(err)
		}
	}}
	r.must(r.d.Pause(bg, r.thin(), "a test", false))
	if n := len(r.d.Paused()); n != 0 {
		t.Errorf("%d are paused that were let meanwhile", n)
	}
	w.further(t)
	done()
	r.d.kernel = &late{kernel: r.d.Host, after: func() {
		_, err := r.d.Attach(bg, spec(over, base)) // and not: resumed, as what is left over
		r.refused("attached", err)
		if _, err := r.d.Let(found[0]); !errors.Is(err, fault.Unavailable) {
			t.Errorf("let: %v", err)
		}
	}}
	r.must(r.d.Pause(bg, r.thin(), "a test", true))
	if !strings.Contains(r.tables(), "suspended=true") || len(r.d.Paused()) != 1 {
		t.Errorf("it is not paused:\n%s", r.tables())
	}
	r.d.kernel = nil
	r.must(r.d.Unpause(r.d.Paused()))
	w.further(t)
}

// A merge that fails because nothing can be written to its layer any more begins again with every
// resume, and its first step would be to put the layer's header over the image's first chunk.
func TestAMergeThatFailsIsNotBegunAgain(t *testing.T) {
	for name, then := range map[string]func(r *rig, over Slab, failed func()){
		"failed and paused": func(r *rig, _ Slab, failed func()) {
			failed()
			r.must(r.d.Pause(bg, r.thin(), "a test", false))
			if n := len(r.d.Paused()); n != 0 {
				r.Errorf("%d are paused", n)
			}
		},
		"paused as it fails": func(r *rig, _ Slab, failed func()) {
			r.d.kernel = &late{kernel: r.d.Host, before: failed}
			r.must(r.d.Pause(bg, r.thin(), "a test", false))
			r.d.kernel = nil
			if n := len(r.d.Paused()); n != 0 {
				r.Errorf("%d are paused", n)
			}
		},
		"stopped as it fails": func(r *rig, over Slab, failed func()) {
			r.d.kernel = &late{kernel: r.d.Host, before: failed}
			if err := r.d.StopMerge(bg, over.ID); !errors.Is(err, fault.Corrupt) {
				r.Errorf("stopped: %v", err)
			}
			r.d.kernel = nil
			r.must(r.d.StopMerge(bg, over.ID))
		},
		"left suspended": func(r *rig, over Slab, failed func()) {
			failed()
			m, err := r.d.Host.MappedByUUID(bg, slabUUID(over.ID))
			r.must(err)
			r.must(r.d.Host.SuspendMapped(bg, *m, false))
			if err := r.d.Host.ResumeMapped(bg, *m); !errors.Is(err, fault.Corrupt) {
				r.Errorf("resumed: %v", err)
			}
			_, err = devices().Recover(bg)
			r.must(err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			const size = 32 * mib
			base := r.raw("base", size)
			over, refuse := r.full("over", size)
			dev := r.attach(spec(base))
			c := content{}
			r.write(dev.Path, c, 1, 0, 1, 2)
			r.change(over, base)
			r.write(dev.Path, c, 2, every(4*per, 4*per, size)...)
			_, err := r.d.Merge(bg, []Slab{over, base})
			r.must(err)
			m, err := r.d.Host.MappedByUUID(bg, slabUUID(over.ID))
			r.must(err)
			then(r, over, func() {
				refuse(true)
				waitFor(t, func() bool {
					status, err := r.d.status(bg, *m)
					r.must(err)
					return status == host.MergeFailed
				})
			})
			if strings.Contains(r.tables(), "suspended=true") {
				t.Errorf("left is\n%s", r.tables())
			}
			time.Sleep(time.Second) // a merge that goes on is that fast
			r.verify("after the merge failed", dev.Path, size, c)
			refuse(false)
			r.detach(dev)
			dev = r.attach(spec(over, base))
			r.verify("attached again", dev.Path, size, c)
			r.write(dev.Path, c, 3, every(per, 16*per, size)...)
			r.merge(over, base)
			r.verify("merged", dev.Path, size, c)
		})
	}
}

// TestAPauseEndsWithItsAgent, and the next one takes over.
func TestAPauseEndsWithItsAgent(t *testing.T) {
	r := newRig(t)
	const size = 4 * mib
	base, over := r.raw("base", size), r.layer("over", size)
	dev := r.attach(spec(over, base))
	w := r.writer(dev.Path)
	w.further(t)
	text, err := json.Marshal(order{What: "pause"})
	r.must(err)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), orderEnv+"="+string(text))
	out, err := cmd.StdoutPipe()
	r.must(err)
	r.must(cmd.Start())
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "paused\n" {
		t.Fatalf("%q, %v", line, err)
	}
	if !strings.Contains(r.tables(), "suspended=true") {
		t.Errorf("nothing is suspended:\n%s", r.tables())
	}
	r.must(cmd.Process.Kill())
	_ = cmd.Wait()
	w.further(t) // the watchdog resumes
	if _, err := r.d.Recover(bg); err != nil {
		t.Error(err)
	}
	r.pause()
	mapped, err := host.NewLocal(host.Exec{}).Mapped(bg, uuidPrefix)
	r.must(err)
	suspended := 0
	for _, m := range mapped {
		if m.Suspended {
			suspended++
		}
	}
	if suspended != 1 {
		t.Errorf("%d are suspended", suspended)
	}
	r.must(r.d.Unpause(r.d.Paused()))
	w.further(t)
}
