package behaviour

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/admin"
)

// says checks an output of kubectl-quarry.
func says(t *testing.T, out string, all ...string) {
	t.Helper()
	for _, s := range all {
		if !strings.Contains(out, s) {
			t.Errorf("it does not say %q:\n%s", s, out)
		}
	}
	if testing.Verbose() {
		t.Log("\n" + out)
	}
}

func TestKubectlQuarryShowsDomainsImagesAndChains(t *testing.T) {
	ext4, xfs := on(t, "on-ext4", "ext4", 512*mib), on(t, "on-xfs", "xfs", 512*mib)
	r := newRig(t, ext4, xfs)
	v := r.volume("on-ext4", "the-volume", 32*mib, filesystem("ext4")).mount()
	snap := r.snapshot(v, "the-snapshot")
	clone := r.copyOf(fromSnapshot(snap), "on-xfs", "the-clone", 32*mib, filesystem("ext4"))
	r.snapshot(clone, "the-native-snapshot")

	out, exit := r.kubectl("domains")
	if exit != 0 {
		t.Errorf("domains: status %d", exit)
	}
	says(t, out, "on-ext4.", "on-xfs.", "dir")
	domains := ask[[]admin.Domain](r, "domains")
	for _, d := range domains {
		if !d.Open || d.Owner != "behaviour" || d.Volumes != 1 || d.Snapshots != 1 || d.Promised < 32*mib {
			t.Errorf("domain %+v", d)
		}
		if native := strings.Contains(strings.Join(d.Capabilities, " "), "snapshot"); native != (d.Name == "on-xfs") {
			t.Errorf("domain %s: capabilities %v", d.Name, d.Capabilities)
		}
	}
	out, _ = r.kubectl("images", "-o", "wide")
	says(t, out, v.id, "the-volume", snap, "the-snapshot", clone.id, "the-clone", nodeID, "copy, frozen for", "native", "ext4")
	out, exit = r.kubectl("chain", "the-clone")
	if exit != 0 {
		t.Errorf("chain: status %d", exit)
	}
	says(t, out, "the-volume", "the-snapshot", "the-clone", "the-native-snapshot")
	out, exit = r.kubectl("chain", "nothing-of-the-kind")
	if exit != 1 {
		t.Errorf("chain of nothing: status %d", exit)
	}
	says(t, out, "nothing-of-the-kind")
	out, exit = r.kubectl("operations")
	if exit != 0 {
		t.Errorf("operations: status %d", exit)
	}
	says(t, out, "No operations")
	out, exit = r.kubectl("check")
	if exit != 0 {
		t.Errorf("check of healthy domains: status %d", exit)
	}
	says(t, out, "No findings")
	v.unmount()
}

func TestCheckAndFixDealWithDamageAndTouchNothingElse(t *testing.T) {
	p := on(t, "hurt", "ext4", 512*mib)
	r := newRig(t, p)
	v := r.volume(p.name, "healthy", 32*mib, filesystem("ext4"))
	cut := r.volume(p.name, "cut", 32*mib, filesystem("ext4"))
	lost := r.volume(p.name, "lost", 32*mib, filesystem("ext4"))
	cut.works()
	r.stop()
	// Damage: a slab of nobody, a truncated one, one that is gone.
	whole := filepath.Join(r.dir, "whole")
	if err := errors.Join(
		os.WriteFile(filepath.Join(p.path, "slabs", "0123456789abcdef0123-100000001"), make([]byte, mib), 0o600),
		copyFile(slabFile(p, cut.image()), whole),
		os.Truncate(slabFile(p, cut.image()), 4096),
		os.Rename(slabFile(p, lost.image()), filepath.Join(p.path, "lost")),
	); err != nil {
		t.Fatal(err)
	}
	r.start()

	out, exit := r.kubectl("check")
	if exit != 2 {
		t.Errorf("check of a hurt domain: status %d, not 2", exit)
	}
	says(t, out, "0123456789abcdef0123-100000001", cut.image(), "truncated", lost.image(), "missing", "delete it", "need a person")
	before := content(t, p, "slabs")
	out, _ = r.kubectl("fix") // a dry run
	says(t, out, "0123456789abcdef0123-100000001")
	if err := same(before, content(t, p, "slabs")); err != nil {
		t.Errorf("a dry run changed something: %v", err)
	}
	// A person restores the slab, and fix takes it into use.
	if err := errors.Join(copyFile(whole, slabFile(p, cut.image())), os.Rename(filepath.Join(p.path, "lost"), slabFile(p, lost.image()))); err != nil {
		t.Fatal(err)
	}
	out, _ = r.kubectl("check")
	says(t, out, cut.image(), "mend", "take it into use again")
	r.eventually("fix to deal with everything", func() error {
		out, exit = r.kubectl("fix", "--yes")
		if _, err := os.Stat(filepath.Join(p.path, "slabs", "0123456789abcdef0123-100000001")); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("the stray slab is there: %v, status %d: %s", err, exit, out)
		}
		return nil
	})
	t.Log(out)
	out, exit = r.kubectl("check")
	if exit != 0 {
		t.Errorf("check after fix: status %d:\n%s", exit, out)
	}
	for _, v := range []*volume{v, cut, lost} {
		v.works()
	}
}

func copyFile(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o600)
}
