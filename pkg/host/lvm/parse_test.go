package lvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

func fixture(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestWhatLVMSaysHasAKind(t *testing.T) {
	for name, want := range map[string]struct {
		group string
		kind  fault.Kind
		tells string // what the message must hold
	}{
		"exists":             {"q1", fault.Exists, "qs.t2"},
		"rename-exists":      {"q1", fault.Exists, "qs.s2r"},
		"not-found":          {"q1", fault.NotFound, "nope"},
		"grow-not-found":     {"data", fault.NotFound, "qs.nope"},
		"rename-not-found":   {"q1", fault.NotFound, "qs.s2"},
		"origin-not-found":   {"q1", fault.NotFound, "qs.nope"},
		"pool-not-found":     {"q1", fault.NotFound, "nope"},
		"in-use":             {"q1", fault.InUse, "qs.a"},
		"origin-frozen":      {"q1", fault.InUse, "busy"},
		"no-extents":         {"data", fault.Exhausted, "vgextend"},
		"no-extents-to-grow": {"data", fault.Exhausted, "1020 extents needed"},
		"metadata-full":      {"qsmall", fault.Exhausted, "--metadatasize"},
		"too-large":          {"data", fault.OutOfRange, "4.00 PiB"},
		"remove-failed":      {"xqtest", fault.Unavailable, "Failed to write VG"}, // and the other volume was not there
		"vanished":           {"q2", fault.Unavailable, "volume group q2 is not there"},
		"partial-create":     {"q2", fault.Unavailable, "a disk of volume group q2 is missing"},
		"partial-activate":   {"q2", fault.Unavailable, "a disk of volume group q2 is missing"},
		"foreign":            {"q1", fault.Permission, "belongs to another host"},
		"exported":           {"data", fault.Permission, "vgimport"},
		"exported-list":      {"data", fault.Permission, "vgimport"},
		"twins-create":       {"twin", fault.Invalid, "vgrename"},
	} {
		t.Run(name, func(t *testing.T) {
			exit := &host.ExitError{Command: host.Command{Name: "lvm", Args: []string{"lvcreate"}}, Result: host.Result{Stderr: fixture(t, name+".stderr"), ExitCode: 5}}
			err := New(nil, want.group, Options{}).explain(exit)
			if fault.KindOf(err) != want.kind || !strings.Contains(err.Error(), want.tells) || strings.Contains(err.Error(), "WARNING") {
				t.Errorf("%v (%v), want kind %v and %q in it, and no warning", err, fault.KindOf(err), want.kind, want.tells)
			}
		})
	}
}

func TestWhatIsNotKnownIsUnavailable(t *testing.T) {
	g := New(nil, "data", Options{})
	exit := &host.ExitError{Result: host.Result{Stderr: []byte("  Something new happened.\n"), ExitCode: 5}}
	if err := g.explain(exit); !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "Something new") {
		t.Errorf("%v (%v)", err, fault.KindOf(err))
	}
	exit.Result.Stderr = []byte("  Something new happened.\n  Failed to find logical volume \"data/qp.a\"\n")
	if err := g.explain(exit); !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "Something new") {
		t.Errorf("beside a volume that need not be there: %v (%v)", err, fault.KindOf(err))
	}
	exit.Result.Stderr = []byte("  Thin pool data-pool-tpool (253:2) transaction_id is 6, while expected 5.\n")
	if err := g.explain(exit); !errors.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "docs/engines/lvm.md") {
		t.Errorf("a pool of another time: %v (%v)", err, fault.KindOf(err))
	}
	exit.Result.Stderr = fixture(t, "large-enough.stderr")
	if err := g.explain(exit); !errors.Is(err, errLargeEnough) {
		t.Errorf("lvextend to the present size: %v", err)
	}
	// A volume of the group's name that is missing does not make the group vanish.
	exit.Result.Stderr = []byte("  Failed to find logical volume \"data/data\"\n")
	if err := g.explain(exit); !errors.Is(err, fault.NotFound) {
		t.Errorf("%v (%v), want %v", err, fault.KindOf(err), fault.NotFound)
	}
	if err := g.explain(fault.New(fault.Unsupported, "no program")); !errors.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "lvm2") {
		t.Errorf("without lvm2: %v", err)
	}
}

func TestReports(t *testing.T) {
	g := New(nil, "data", Options{})
	info, err := g.parseInfo(fixture(t, "vgs.json"))
	if err != nil || info.UUID != "uUcLRC-zgV3-r890-SkjX-lVSp-yink-YeNQVY" || info.Seqno != 4 || info.Extent != 1<<20 || info.Size != 130023424 || info.Free != 125829120 ||
		info.MetadataSize != 2093056 || info.MetadataFree != 1043456 || info.ReadOnly || info.Exported || info.Clustered || info.Missing != 0 ||
		!slices.Equal(info.Devices, []string{"/dev/loop1", "/dev/loop3"}) {
		t.Errorf("%+v, %v", info, err)
	}
	if info, err := g.parseInfo(fixture(t, "vgs-exported.json")); err != nil || !info.Exported {
		t.Errorf("an exported group: %+v, %v", info, err)
	}
	l, err := parseVolumes(fixture(t, "lvs.json"))
	if err != nil || l.UUID != info.UUID || l.Seqno != 4 || l.MetadataFree != 1043456 || len(l.Volumes) != 3 || l.Volumes[0].Name != "qs.a" || l.Volumes[0].Size != 4<<20 ||
		l.Volumes[0].Used != -1 || !slices.Equal(l.Volumes[1].Tags, []string{"q:r=eyJvd25lciI6Im1lIn0", "q:t=e.00000001::1cf2a5c3"}) {
		t.Errorf("%+v, %v", l, err)
	}
	if l, err := parseVolumes(fixture(t, "lvs-empty.json")); err != nil || len(l.Volumes) != 0 {
		t.Errorf("an empty report: %+v, %v", l, err)
	}
	l, all, err := parseDetails(fixture(t, "lvs-details.json"))
	old, frozen := all["old"], all["frozen"]
	if err != nil || l.Seqno != 10 || l.Disks != 2 || len(all) != 4 || old.UUID != "pYk9cW-u4Zv-Go09-949g-u0gv-pkko-NF38Nv" || old.Size != 12<<20 || old.ReadOnly || !frozen.ReadOnly ||
		!slices.Equal(old.Tags, []string{"backup=daily", "q:i=a:old"}) || !slices.Equal(old.Segments, []string{"linear", "linear"}) || !slices.Equal(old.Layout, []string{"linear"}) ||
		!slices.Equal(old.Roles, []string{"public"}) || all["striped"].Layout[0] != "striped" || all["quarry"].Segments[0] != "error" || old.Origin != "" || old.Pool != "" {
		t.Errorf("%+v, %+v, %v", l, all, err)
	}
	if _, all, err := parseDetails(fixture(t, "lvs-empty.json")); err != nil || len(all) != 0 {
		t.Errorf("an empty report of details: %+v, %v", all, err)
	}
	if _, all, err := parseDetails(fixture(t, "lvs.json")); !errors.Is(err, fault.Internal) {
		t.Errorf("a report without details: %+v, %v", all, err)
	}
	p, err := g.parsePool(fixture(t, "pool.json"), "pool")
	if err != nil || p.Size != 64<<20 || p.MetadataSize != 4<<20 || p.DataPercent != 10.45 || p.MetadataPercent != 11.23 || !p.Zero || p.ErrorWhenFull || p.Health != "" || p.Transaction != 3 {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := g.parsePool(fixture(t, "lvs-empty.json"), "pool"); !errors.Is(err, fault.NotFound) {
		t.Errorf("a pool that is not there: %v", err)
	}
	for what, report := range map[string]string{
		"no report":       "",
		"half a report":   `{"report": [{"lv": [{"vg_uuid"`,
		"a field missing": `{"report": [{"lv": [{"vg_uuid":"a", "vg_seqno":"1", "pv_count":"1", "vg_missing_pv_count":"0", "vg_mda_free":"1", "lv_name":"qs.a", "lv_size":"1", "lv_tags":""}]}]}`,
		"no number":       `{"report": [{"lv": [{"vg_uuid":"a", "vg_seqno":"1", "pv_count":"1", "vg_missing_pv_count":"0", "vg_mda_free":"1", "lv_name":"qs.a", "lv_size":"4.00m", "lv_tags":"", "pool_lv":""}]}]}`,
	} {
		if l, err := parseVolumes([]byte(report)); !errors.Is(err, fault.Internal) {
			t.Errorf("%s: %+v, %v", what, l, err)
		}
	}
}

// fake answers every program with the same, and remembers.
type fake struct {
	res     host.Result
	err     error
	ctx     context.Context
	command host.Command
}

func (f *fake) Run(ctx context.Context, c host.Command) (host.Result, error) {
	f.ctx, f.command = ctx, c
	return f.res, f.err
}

func TestChangesAreNotKilledByTheirCaller(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	f := &fake{}
	g := New(f, "data", Options{Devices: []string{"/dev/a", "/dev/b"}})
	if err := g.CreateRecord(ctx, "qt.a", "q:t=a::0", "q:r=b"); err != nil {
		t.Fatal(err)
	}
	cancel()
	if f.ctx.Err() != nil {
		t.Error("the program would have been killed half-way")
	}
	line := f.command.String()
	for _, want := range []string{"lvm lvcreate ", "--devices /dev/a,/dev/b", "-an", "--addtag q:t=a::0 --addtag q:r=b", "backup=0"} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is not in %q", want, line)
		}
	}
	f.command = host.Command{}
	if err := g.CreateRecord(ctx, "qt.b"); !errors.Is(err, fault.Canceled) || f.command.Name != "" {
		t.Errorf("a call whose caller has gone: %v, and %q was run", err, f.command)
	}
}

func TestAGroupWithADiskMissingKeepsItsVolumes(t *testing.T) {
	f := &fake{} // what lvremove says where its selection matches nothing: nothing
	err := New(f, "data", Options{}).RemoveRecord(t.Context(), "the-uuid", "qt.a")
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "is missing") || !strings.Contains(err.Error(), "UUID the-uuid") {
		t.Errorf("nothing was removed: %v", err)
	}
	if want := `-S vg_missing_pv_count=0&&vg_uuid="the-uuid"`; !strings.Contains(f.command.String(), want) {
		t.Errorf("%q would remove from a group with a disk missing, or from another group", f.command)
	}
}

func TestWhatWasNotThere(t *testing.T) {
	const (
		gone      = "  Failed to find logical volume \"data/qs.a\"\n"
		otherGone = "  Failed to find logical volume \"data/qp.a\"\n"
		removed   = "  Logical volume \"qs.a\" successfully removed.\n"
	)
	for name, c := range map[string]struct {
		stdout, stderr string
		want           error
	}{
		"the unfinished one":                     {removed, otherGone, nil},
		"both":                                   {"", gone + otherGone, fault.NotFound},
		"one, the other was not selected":        {"", otherGone, fault.Unavailable},
		"one, the other could not be removed":    {"", "  Failed to write VG data.\n" + otherGone, fault.Unavailable},
		"one, the other is in use":               {"", "  Logical volume data/qs.a in use.\n" + otherGone, fault.InUse},
		"neither, after a failure to be told of": {"", "  Failed to update pool data/pool.\n" + gone + otherGone, fault.Unavailable},
	} {
		s := &script{answers: []host.Result{{Stdout: []byte(c.stdout), Stderr: []byte(c.stderr), ExitCode: 5}}}
		if err := New(s, "data", Options{}).remove(t.Context(), writes, "", "the-uuid", "qs.a", "qp.a"); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// TestAVolumeThatLVMPassesOver was not changed, although the program succeeded.
func TestAVolumeThatLVMPassesOver(t *testing.T) {
	f := &fake{}
	g := New(f, "data", Options{})
	for name, change := range map[string]struct {
		do    func() error
		wants string
	}{
		"AddTag": {func() error { return g.AddTag(t.Context(), "the-uuid", "old", "its-uuid", "q:i=a:old") },
			`vg_missing_pv_count=0&&vg_uuid="the-uuid"&&lv_uuid="its-uuid" --addtag q:i=a:old data/old`},
		"RemoveTag": {func() error { return g.RemoveTag(t.Context(), "the-uuid", "old", "q:i=a:old") },
			`vg_missing_pv_count=0&&vg_uuid="the-uuid"&&lv_tags="q:i=a:old" --deltag q:i=a:old data/old`},
		"Adopt": {func() error { return g.Adopt(t.Context(), "the-uuid", "qs.a", "q:s=a", "q:i=a:old", "q:i=b:old") },
			`vg_missing_pv_count=0&&vg_uuid="the-uuid"&&lv_tags="q:i=a:old" --setactivationskip y --setautoactivation n --addtag q:s=a --deltag q:i=a:old --deltag q:i=b:old data/qs.a`},
	} {
		f.res = host.Result{}
		if err := change.do(); !errors.Is(err, fault.Conflict) || !strings.HasSuffix(strings.Join(f.command.Args, " "), change.wants) {
			t.Errorf("%s: %v, ran %q", name, err, f.command.Args)
		}
		f.res.Stdout = []byte("  Logical volume data/old changed.\n")
		if err := change.do(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestWhatTakesItsTime: a program that was ended would do all of it again.
func TestWhatTakesItsTime(t *testing.T) {
	f := &fake{res: host.Result{Stdout: []byte("successfully removed")}}
	keeps, discards := New(f, "data", Options{}), New(f, "data", Options{Discard: true})
	for name, c := range map[string]struct {
		do   func() error
		want time.Duration
	}{
		"removing":                {func() error { return keeps.remove(t.Context(), writes, "", "the-uuid", "qs.a") }, timeout},
		"removing and discarding": {func() error { return discards.remove(t.Context(), writes, "", "the-uuid", "qs.a") }, slow},
		"activating":              {func() error { return keeps.Activate(t.Context(), "pool") }, slow},
		"making":                  {func() error { return discards.CreateRecord(t.Context(), "qt.a") }, timeout},
	} {
		if err := c.do(); err != nil || f.command.Timeout != c.want {
			t.Errorf("%s may take %v, want %v: %v", name, f.command.Timeout, c.want, err)
		}
	}
}

func TestNamesAreQuoted(t *testing.T) {
	have := Names([]string{"quarry"}, []string{"qt.e.", "qt-"})
	if want := `lv_name="quarry"||lv_name=~"^qt[.]e[.]"||lv_name=~"^qt-"`; have != want {
		t.Errorf("%s, want %s", have, want)
	}
	if have := DeviceName("my-group", "qs.a-1"); have != "my--group-qs.a--1" {
		t.Errorf("device name %q", have)
	}
}

// script answers program after program.
type script struct {
	answers  []host.Result
	commands []string
}

func (s *script) Run(_ context.Context, c host.Command) (host.Result, error) {
	res := s.answers[len(s.commands)]
	s.commands = append(s.commands, c.String())
	if res.ExitCode != 0 {
		return res, &host.ExitError{Command: c, Result: res}
	}
	return res, nil
}

func TestWhatAKilledProgramLeftInAPoolIsRemoved(t *testing.T) {
	stuck := host.Result{Stderr: fixture(t, "interrupted.stderr"), ExitCode: 5}
	s := &script{answers: []host.Result{stuck, {}, {}}}
	if err := New(s, "quarry-test-da21875e", Options{}).Snapshot(t.Context(), "qs.a", "qp.b"); err != nil {
		t.Fatal(err)
	}
	if len(s.commands) != 3 || s.commands[1] != "dmsetup message quarry--test--da21875e-pool-tpool 0 delete 4" || s.commands[2] != s.commands[0] {
		t.Errorf("ran %q", s.commands)
	}
	s = &script{answers: []host.Result{stuck}}
	if err := New(s, "another", Options{}).Snapshot(t.Context(), "qs.a", "qp.b"); !errors.Is(err, fault.Unavailable) || len(s.commands) != 1 {
		t.Errorf("another group's pool: %v, ran %q", err, s.commands)
	}
	s = &script{answers: []host.Result{stuck, {}, stuck}}
	if err := New(s, "quarry-test-da21875e", Options{}).Snapshot(t.Context(), "qs.a", "qp.b"); !errors.Is(err, fault.Unavailable) {
		t.Errorf("still stuck: %v", err)
	}
}

func TestThinPoolStates(t *testing.T) {
	for status, want := range map[string]Pool{
		"1 129/1024 100/400 - rw no_discard_passdown queue_if_no_space - 1024":            {Transaction: 1, MetadataSize: 4 << 20, MetadataPercent: 12.59765625, DataPercent: 25},
		"0 10/1000 400/400 - out_of_data_space discard_passdown error_if_no_space - 1024": {MetadataSize: 4096000, MetadataPercent: 1, DataPercent: 100, Health: "out_of_data"},
		"7 500/500 10/400 - ro discard_passdown queue_if_no_space needs_check 1024":       {Transaction: 7, MetadataSize: 2048000, MetadataPercent: 100, DataPercent: 2.5, Health: "metadata_read_only"},
		"7 250/500 10/400 - rw discard_passdown queue_if_no_space needs_check 1024":       {Transaction: 7, MetadataSize: 2048000, MetadataPercent: 50, DataPercent: 2.5, Health: "needs_check"},
	} {
		if have, ok := parseThinPool(status); !ok || have != want {
			t.Errorf("%q: %+v, %v, want %+v", status, have, ok, want)
		}
	}
	for _, status := range []string{"", "Fail", "Error", "1 2 3 4 5", "1 5/0 5/0 - rw", "x 1/5 1/5 - rw"} {
		if have, ok := parseThinPool(status); ok {
			t.Errorf("%q: %+v", status, have)
		}
	}
}
