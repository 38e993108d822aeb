package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest/hangfs"
)

// A program that sleeps in the kernel survives its killing, and may still write
// when the next one of its kind is started.
func TestAProgramThatCannotBeKilledIsNotStartedBesideItself(t *testing.T) {
	fs, dir := hangfs.New(t, 1<<20), t.TempDir()
	started := filepath.Join(dir, "started")
	// It stands for any program that works on storage.
	script := "#!/bin/sh\necho x >> " + started + "\nexec cat " + fs.File + "\n"
	if err := os.WriteFile(filepath.Join(dir, "xfs_growfs"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	l := NewLocal(Exec{})
	grow := func(ctx context.Context) error {
		return within(t, "growing", func() error { return l.GrowFilesystem(ctx, XFS, "/dev/x", "/mnt") })
	}
	starts := func() int {
		b, err := os.ReadFile(started)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(b), "x")
	}

	ctx, cancel := context.WithCancel(t.Context())
	fs.Hang(func(op hangfs.Op) bool { return op == hangfs.Open })
	running := make(chan error, 1)
	go func() { running <- l.GrowFilesystem(ctx, XFS, "/dev/x", "/mnt") }()
	fs.Held(t)
	if err := grow(t.Context()); !errors.Is(err, fault.Pending) || starts() != 1 {
		t.Fatalf("beside one that runs: %v, %d started", err, starts())
	}
	cancel()
	err := within(t, "what was killed", func() error { return <-running })
	var hang *HangError
	if !errors.Is(err, fault.Canceled) || !errors.As(err, &hang) || l.Abandoned() != 1 {
		t.Fatalf("%v, %d abandoned", err, l.Abandoned())
	}
	if err := grow(t.Context()); !errors.Is(err, fault.Pending) || !contains(err, "still hangs") || starts() != 1 {
		t.Fatalf("beside one that hangs: %v, %d started", err, starts())
	}
	fs.Release()
	<-hang.Ended
	until(t, "it is forgotten", func() bool { return l.Abandoned() == 0 })
	if err := grow(t.Context()); err != nil || starts() != 2 {
		t.Fatalf("afterwards: %v, %d started", err, starts())
	}
}
