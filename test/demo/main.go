// Demo shows Quarry at work on real file systems: it makes an ext4 and an XFS
// disk in sparse files, serves a domain on each with the real quarry binary, and
// drives it over the CSI socket as Kubernetes would. Every step says which way
// was taken and how long it took; the end proves the contents by checksum and
// that nothing was left behind. Run it as root by `make demo`.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	bin := flag.String("bin", "bin", "directory of the binaries quarry and kubectl-quarry")
	work := flag.String("dir", "", "directory to work below (default: a temporary one)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := demo(ctx, newScreen(os.Stdout), *bin, *work)
	stop()
	if err != nil {
		os.Exit(1)
	}
}

// cleaning is how long taking everything down may last, whatever went before.
const cleaning = time.Minute

func demo(ctx context.Context, s *screen, bin, work string) (err error) {
	var cleaned error
	defer func() {
		err = errors.Join(err, cleaned)
		switch {
		case ctx.Err() != nil && cleaned == nil:
			s.failed(errors.New("interrupted; everything was taken down"))
		case ctx.Err() != nil:
			s.failed(fmt.Errorf("interrupted; not everything was taken down: %w", cleaned))
		case err != nil:
			s.failed(err)
		}
	}()
	if os.Geteuid() != 0 {
		return errors.New("the demo mounts file systems: run it as root")
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	// /var/tmp rather than /tmp: it is hardly ever a memory file system.
	if work == "" {
		work = "/var/tmp"
	}
	dir, err := os.MkdirTemp(work, "quarry-demo-")
	if err != nil {
		return err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleaning)
		defer cancel()
		cleaned = errors.Join(cleaned, tearDown(ctx, dir))
	}()

	started := time.Now()
	s.title("Quarry: the same features on unlike storage")
	s.note("Everything happens below %s and is taken down at the end.", dir)

	s.title("Two disks, two domains, one process")
	places := []*place{
		{domain: "on-ext4", disk: "ext4", filesystem: "ext4"},
		{domain: "on-xfs", disk: "xfs", filesystem: "xfs"},
	}
	if may, err := mayGrowExt4(); err != nil {
		return err
	} else if !may {
		places[0].filesystem = "xfs"
		s.note("This process lacks CAP_SYS_RESOURCE, without which Linux grows no mounted ext4:\nboth domains get volumes with XFS inside.")
	}
	for _, p := range places {
		begin := time.Now()
		if p.path, err = disk(ctx, dir, p.disk, diskSize); err != nil {
			return err
		}
		s.done(fmt.Sprintf("a disk of %s with %s", size(diskSize), p.disk), "", time.Since(begin))
	}
	q, err := startQuarry(ctx, bin, dir, places)
	if err != nil {
		return err
	}
	defer func() {
		stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleaning)
		defer cancel()
		cleaned = q.end(stopping)
		if errors.Join(err, cleaned) != nil && ctx.Err() == nil {
			s.note("The last lines of quarry's log:\n%s", q.LastLog(10))
		}
	}()
	s.done("quarry standalone serves CSI on a Unix socket", q.identity, q.startup)
	if err := q.show(ctx, s, "domains"); err != nil {
		return err
	}
	if err := q.reasons(ctx, s); err != nil {
		return err
	}

	for i, p := range places {
		other := places[(i+1)%len(places)]
		st := &story{screen: s, quarry: q, here: p, other: other}
		if err := st.tell(ctx); err != nil {
			return fmt.Errorf("%s: %w", p.domain, err)
		}
	}

	s.title("Nothing is left behind")
	if err := proveEmpty(ctx, s, q, dir, places); err != nil {
		return err
	}
	s.title("Done in %s.", round(time.Since(started)))
	return nil
}
