package behaviour

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

func TestABadDomainIsRefusedInOneLineThatSaysWhichAndWhy(t *testing.T) {
	r := idleRig(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	domain := func(engine, params string) string {
		return "domains:\n- name: fine\n  engine: dir\n  params: {path: " + dir + "}\n- name: odd\n  engine: " + engine + "\n  params: " + params + "\n"
	}
	for name, c := range map[string]struct {
		config string
		says   []string
	}{
		"unknown engine":       {domain("floppy", "{}"), []string{`"floppy"`, "engine", `"dir"`}},
		"unknown parameter":    {domain("dir", "{path: /x, colour: red}"), []string{`params.colour`, "path"}},
		"path missing":         {domain("dir", "{}"), []string{"path"}},
		"path relative":        {domain("dir", "{path: some/where}"), []string{"some/where", "absolute"}},
		"path does not exist":  {domain("dir", "{path: "+dir+"/none}"), []string{dir + "/none", "exist"}},
		"path not a directory": {domain("dir", "{path: "+file+"}"), []string{file, "director"}},
	} {
		t.Run(name, func(t *testing.T) {
			r.t = t
			line := r.refused(c.config)
			t.Log(line)
			for _, s := range append(c.says, "odd") {
				if !strings.Contains(line, s) {
					t.Errorf("%q does not say %q", line, s)
				}
			}
		})
	}
	r.t = t
}

func TestAReadOnlyDomainIsRefused(t *testing.T) {
	p := on(t, "frozen", "ext4", 64*mib)
	if err := unix.Mount("", p.path, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	r := idleRig(t, p)
	line := r.refused(r.config())
	t.Log(line)
	for _, s := range []string{p.name, p.path, "read-only"} {
		if !strings.Contains(line, s) {
			t.Errorf("%q does not say %q", line, s)
		}
	}
	if entries, err := os.ReadDir(p.path); err != nil || len(entries) != 1 { // lost+found
		t.Errorf("the refused domain holds %v, %v", entries, err)
	}
}

func TestADomainOfAnotherInstallationIsRefusedWithItsName(t *testing.T) {
	p := on(t, "ours", "ext4", 256*mib)
	r := newRig(t, p)
	v := r.volume(p.name, "v", 16*mib, filesystem("ext4"))
	r.kill()
	before := content(t, p, "slabs", "tags")
	line := r.refused(r.config(), "--installation", "somebody-else")
	t.Log(line)
	for _, s := range []string{p.name, `"behaviour"`, `"somebody-else"`, "takeOver: true"} {
		if !strings.Contains(line, s) {
			t.Errorf("%q does not say %q", line, s)
		}
	}
	if err := same(before, content(t, p, "slabs", "tags")); err != nil {
		t.Error(err)
	}
	r.start()
	v.works()
	r.kill()
	// What the line advises works.
	r.places[0].more, r.args = "  takeOver: true\n", []string{"--installation", "somebody-else"}
	r.start()
	v.works()
	r.kill()
	r.places[0].more, r.args = "", nil
	if line := r.refused(r.config()); !strings.Contains(line, `"somebody-else"`) {
		t.Errorf("%q does not name the new owner", line)
	}
}

func TestATagOfAnEpochCutInHalfIsRefusedAtTheNextStart(t *testing.T) {
	p := on(t, "ours", "ext4", 256*mib)
	r := newRig(t, p)
	v := r.volume(p.name, "v", 16*mib, filesystem("ext4"))
	r.kill()
	tags, err := filepath.Glob(filepath.Join(p.path, "tags", "e", "e.*"))
	if err != nil || len(tags) == 0 {
		t.Fatalf("no epoch: %v", err)
	}
	last := tags[len(tags)-1]
	info, err := os.Stat(last)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(last)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(last, info.Size()/2); err != nil {
		t.Fatal(err)
	}
	before := content(t, p, "slabs", "tags")
	line := r.refused(r.config())
	t.Log(line)
	for _, s := range []string{p.name, filepath.Base(last), "takeOver: true"} {
		if !strings.Contains(line, s) {
			t.Errorf("%q does not say %q", line, s)
		}
	}
	if err := same(before, content(t, p, "slabs", "tags")); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(last, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	r.start()
	v.works()
}

// A domain that fails, but not for good, must not keep the other from opening.
func TestAnObjectOfADomainThatIsNotConfiguredAnyMoreIsUnavailable(t *testing.T) {
	here, gone := on(t, "here", "ext4", 256*mib), on(t, "gone", "ext4", 256*mib)
	r := newRig(t, here, gone)
	v, lost := r.volume(here.name, "v", 16*mib, filesystem("ext4")), r.volume(gone.name, "w", 16*mib, filesystem("ext4"))
	r.kill()
	r.places = []place{here}
	r.start()
	before := content(t, gone, "slabs", "tags")
	for name, try := range callsOn(r, lost) {
		t.Run(name, func(t *testing.T) { refusal(t, try(), codes.Unavailable, "gone.") })
	}
	if err := same(before, content(t, gone, "slabs", "tags")); err != nil {
		t.Error(err)
	}
	v.works()
	r.stop()
	r.places = []place{here, gone}
	r.start()
	lost.works()
}
