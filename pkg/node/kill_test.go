package node

import (
	"bufio"
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// With these this test binary is a process that freezes and waits, or one that
// stages and unstages until it is killed.
const (
	freezePoint = "QUARRY_TEST_FREEZE"
	freezeLimit = "QUARRY_TEST_LIMIT"
	churnDir    = "QUARRY_TEST_CHURN"
	churnDomain = "QUARRY_TEST_DOMAIN"
	churnKind   = "QUARRY_TEST_KIND"
)

func TestMain(m *testing.M) {
	var err error
	switch {
	case os.Getenv(freezePoint) != "":
		err = freezeAndWait(os.Getenv(freezePoint), os.Getenv(freezeLimit))
	case os.Getenv(churnDir) != "":
		err = churn(os.Getenv(churnDir), os.Getenv(churnDomain), os.Getenv(churnKind))
	default:
		os.Exit(m.Run())
	}
	println(err.Error())
	os.Exit(1)
}

func freezeAndWait(point, limit string) error {
	d, err := time.ParseDuration(limit)
	if err != nil {
		return err
	}
	if _, err := host.NewLocal(host.Exec{}).Freeze(context.Background(), point, d); err != nil {
		return err
	}
	if _, err := os.Stdout.WriteString("frozen\n"); err != nil {
		return err
	}
	select {}
}

// churnImage is what the killed process and the test agree on.
func churnImage(domain, kind string) (image.Staging, image.Access) {
	st := image.Staging{Handle: image.Handle{Domain: domain, Image: kind}, Layout: image.LayoutImage, Size: 16 << 20, Slabs: []image.SlabRef{{ID: kind}}, Filesystem: host.Ext4}
	a := image.Access{Mode: image.SingleNodeMultiWriter}
	switch kind {
	case "raw":
		st.Block, a.Block = true, true
	case "tree":
		st.Layout = image.LayoutDirectory
	}
	return st, a
}

func (w *world) cycle(st image.Staging, a image.Access, in func(target string) error) error {
	staging, target := w.path("staging-"+st.Handle.Image), w.path("target")
	if err := w.node.Stage(bg, StageRequest{Handle: st.Handle, StagingPath: staging, Access: a}); err != nil {
		return err
	}
	if err := w.node.Publish(bg, PublishRequest{Handle: st.Handle, StagingPath: staging, TargetPath: target, Access: a}); err != nil {
		return err
	}
	if err := in(target); err != nil {
		return err
	}
	if err := w.node.Unpublish(bg, st.Handle, target); err != nil {
		return err
	}
	return w.node.Unstage(bg, st.Handle, staging)
}

func churn(dir, domain, kind string) error {
	w := &world{dir: dir, domain: domain, manager: newManager(), slabs: newAttachments()}
	w.restart()
	st, a := churnImage(domain, kind)
	w.images[st.Handle] = st
	for first := true; ; first = false {
		if err := w.cycle(st, a, func(string) error { return nil }); err != nil {
			return err
		}
		if first {
			if _, err := os.Stdout.WriteString("round\n"); err != nil {
				return err
			}
		}
	}
}

func TestKilledAnywhereItCanBeStagedAndTakenDown(t *testing.T) {
	for _, kind := range []string{"mount", "raw", "tree"} {
		t.Run(kind, func(t *testing.T) {
			w := newWorld(t)
			st, a := churnImage(w.domain, kind)
			h := st.Handle
			switch kind {
			case "tree":
				w.ok(os.Mkdir(w.path(kind), 0o755))
				w.set(h, st)
			default:
				w.volume(kind, st.Size)
				w.change(h, func(s *image.Staging) { s.Block = a.Block })
				w.ok(w.cycle(st, a, func(string) error { return nil }))
				w.set(h, st)
			}
			for round := range 12 {
				w.kill(kind)
				w.restart()
				if round%2 == 0 { // the kubelet may also give up
					w.ok(w.node.Unpublish(bg, h, w.path("target")))
					w.unstage(h)
					w.unstage(h)
				}
				w.ok(w.cycle(st, a, func(target string) error {
					s, err := w.node.find(bg, h)
					if err == nil && kind != "tree" && len(s.devices) != 1 {
						t.Fatalf("devices: %+v", s.devices)
					}
					if err != nil || kind == "raw" {
						return err
					}
					return os.WriteFile(filepath.Join(target, "f"), []byte("x"), 0o600)
				}))
				if staged, err := w.node.Staged(bg, h); err != nil || staged {
					t.Fatalf("left over: %v %v", staged, err)
				}
				w.absent(w.path("target"))
			}
		})
	}
}

// kill runs a process that stages and unstages, and kills it somewhere in its
// second round or later.
func (w *world) kill(kind string) {
	w.t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), churnDir+"="+w.dir, churnDomain+"="+w.domain, churnKind+"="+kind)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	w.ok(err)
	w.ok(cmd.Start())
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "round\n" {
		w.t.Fatalf("the other process said %q: %v", line, err)
	}
	time.Sleep(rand.N(60 * time.Millisecond)) // where it is hit is left to chance
	w.ok(cmd.Process.Kill())
	_ = cmd.Wait() // "signal: killed"
	if cmd.ProcessState.ExitCode() != -1 {
		w.t.Fatalf("the other process ended by itself: %s", cmd.ProcessState)
	}
}
