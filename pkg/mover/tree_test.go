package mover

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

// node is everything that a copy of a file must keep.
type node struct {
	mode         uint32
	uid, gid     uint32
	rdev         uint64
	size         int64
	atime, mtime unix.Timespec
	content      string // checksum, or a link's target
	xattrs       map[string]string
	links        string // the names of the same file, joined
	blocks       int64  // not compared for equality
}

// survey looks at a tree with plain path calls, unlike the code under test.
func survey(t testing.TB, root string) map[string]node {
	t.Helper()
	all := map[string]node{}
	groups := map[[2]uint64][]string{}
	ids := map[string][2]uint64{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		n := node{mode: st.Mode, uid: st.Uid, gid: st.Gid, rdev: st.Rdev, mtime: st.Mtim, atime: st.Atim, blocks: st.Blocks, xattrs: map[string]string{}}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			n.size = st.Size
			f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOATIME, 0)
			if err != nil {
				return err
			}
			h := sha256.New()
			if _, err := io.Copy(h, f); err != nil {
				return err
			}
			f.Close()
			n.content = fmt.Sprintf("%x", h.Sum(nil))
		case unix.S_IFLNK:
			if n.content, err = os.Readlink(path); err != nil {
				return err
			}
			n.atime = unix.Timespec{} // reading a link changes it
		case unix.S_IFDIR:
			n.atime = unix.Timespec{} // so does listing a directory, here
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			id := [2]uint64{st.Dev, st.Ino}
			rel, _ := filepath.Rel(root, path)
			groups[id] = append(groups[id], rel)
			ids[rel] = id
		}
		list := make([]byte, 64<<10)
		k, err := unix.Llistxattr(path, list)
		if err != nil && err != unix.EOPNOTSUPP {
			return err
		}
		for _, name := range strings.Split(strings.TrimSuffix(string(list[:max(k, 0)]), "\x00"), "\x00") {
			if name == "" || strings.HasPrefix(name, "trusted.SGI_ACL_") { // XFS's own form of the ACLs
				continue
			}
			value := make([]byte, 64<<10)
			k, err := unix.Lgetxattr(path, name, value)
			if err != nil {
				return err
			}
			n.xattrs[name] = string(value[:k])
		}
		rel, _ := filepath.Rel(root, path)
		all[rel] = n
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for rel, id := range ids {
		n := all[rel]
		slices.Sort(groups[id])
		n.links = strings.Join(groups[id], "|")
		all[rel] = n
	}
	return all
}

// sameTree compares two trees field by field.
func sameTree(t testing.TB, src, dst string) {
	t.Helper()
	a, b := survey(t, src), survey(t, dst)
	for name, x := range a {
		y, ok := b[name]
		if !ok {
			t.Errorf("%q is missing", name)
			continue
		}
		if !maps.Equal(x.xattrs, y.xattrs) {
			t.Errorf("%q: extended attributes %q, want %q", name, y.xattrs, x.xattrs)
		}
		if y.blocks > x.blocks+256 {
			t.Errorf("%q takes %d blocks, its source %d", name, y.blocks, x.blocks)
		}
		x.xattrs, y.xattrs, x.blocks, y.blocks = nil, nil, 0, 0
		if fmt.Sprint(x) != fmt.Sprint(y) {
			t.Errorf("%q:\n got %+v\nwant %+v", name, y, x)
		}
	}
	for name := range b {
		if _, ok := a[name]; !ok {
			t.Errorf("%q is too much", name)
		}
	}
}

// plant makes a tree with everything that a file system knows.
func plant(t testing.TB, root string, acl bool) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(root, name) }
	must(os.Mkdir(at("dir"), 0o755))
	must(os.MkdirAll(at("dir/empty"), 0o711))
	must(os.WriteFile(at("dir/plain"), []byte("plain"), 0o640))
	must(os.Chown(at("dir/plain"), 12345, 54321))
	must(os.WriteFile(at("dir/nothing"), nil, 0))
	must(os.WriteFile(at("setuid"), []byte("#!"), 0o755))
	must(os.Chown(at("setuid"), 1, 2))
	must(unix.Chmod(at("setuid"), 0o6755))
	must(os.Mkdir(at("sticky"), 0o777))
	must(unix.Chmod(at("sticky"), 0o3777))
	must(os.Chown(at("sticky"), 7, 8))
	must(os.WriteFile(at("capable"), []byte("x"), 0o755))
	// cap_net_raw=ep, revision 2.
	must(unix.Setxattr(at("capable"), "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	for _, name := range []string{"new\nline", "inv\xff\xfealid", "-rf *", strings.Repeat("n", 255), "ünï", ".hidden", ".quarry-links-0", "tab\t"} {
		must(os.WriteFile(at(name), []byte(name), 0o600))
	}
	makeSparse(t, at("sparse"), 16*mib, []extent{{mib, 4096}, {9*mib + 5, 100}})
	must(os.Link(at("dir/plain"), at("dir/second")))
	must(os.Link(at("dir/plain"), at("third")))
	must(os.Link(at("sparse"), at("sparse too")))
	must(os.Symlink("/etc/passwd", at("absolute")))
	must(os.Symlink("../../../../..", at("up")))
	must(os.Symlink("nowhere\xff", at("broken")))
	must(os.Lchown(at("broken"), 3, 4))
	must(os.Link(at("broken"), at("broken too")))
	must(unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(unix.Mknod(at("disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 70000))))
	must(unix.Mkfifo(at("fifo"), 0o622))
	must(os.Link(at("fifo"), at("fifo too")))
	must(unix.Mknod(at("socket"), unix.S_IFSOCK|0o755, 0))
	for name, value := range map[string]string{"user.a": "1", "user.b": "with\x00zero", "user.empty": "", "trusted.t": "t"} {
		must(unix.Setxattr(at("dir/plain"), name, []byte(value), 0))
		must(unix.Setxattr(at("dir"), name, []byte(value), 0))
	}
	must(unix.Lsetxattr(at("broken"), "trusted.link", []byte("l"), 0))
	must(unix.Lsetxattr(at("null"), "trusted.device", []byte("d"), 0))
	must(unix.Lsetxattr(root, "user.root", []byte("r"), 0))
	if acl {
		setfacl(t, "-m", "u:4711:rwx,g:99:r,m::rx", at("setuid"))
		setfacl(t, "-d", "-m", "u:4711:rwx,o::-", at("sticky"))
		setfacl(t, "-d", "-m", "u:4712:r", root)
	}
	must(os.Chown(root, 21, 22))
	must(unix.Chmod(root, 0o2751))
	stamp(t, root)
}

func setfacl(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command("setfacl", args...).CombinedOutput(); err != nil {
		t.Fatalf("setfacl %q: %v: %s", args, err, out)
	}
}

// stamp gives every file times of its own, directories after what is in them.
func stamp(t testing.TB, root string) {
	t.Helper()
	var paths []string
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Reverse(paths)
	for i, path := range paths {
		second := int64(i) * 1e9
		ts := []unix.Timespec{unix.NsecToTimespec(1e18 + second + 123456789), unix.NsecToTimespec(12e17 + second + 987654321)}
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			t.Fatal(err)
		}
	}
}

func sub(t testing.TB, dir, name string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestATreeKeepsEverything(t *testing.T) {
	ext4, xfs, btrfs := hosttest.Filesystem(t, "ext4", 256*mib), hosttest.Filesystem(t, "xfs", 0), hosttest.Filesystem(t, "btrfs", 512*mib)
	subvolume := filepath.Join(btrfs, "subvolume")
	if out, err := exec.Command("btrfs", "subvolume", "create", subvolume).CombinedOutput(); err != nil {
		t.Fatalf("btrfs: %v: %s", err, out)
	}
	sources := map[string]string{}
	for name, dir := range map[string]string{"ext4": ext4, "xfs": xfs, "btrfs": btrfs} {
		sources[name] = sub(t, dir, "src")
		plant(t, sources[name], true)
	}
	for _, c := range []struct{ from, to, dst string }{
		{"ext4", "ext4", sub(t, ext4, "copy")},
		{"xfs", "xfs", sub(t, xfs, "copy")},
		{"btrfs", "btrfs subvolume", subvolume},
		{"ext4", "xfs", sub(t, xfs, "from ext4")},
		{"xfs", "btrfs", sub(t, btrfs, "from xfs")},
		{"btrfs", "ext4", sub(t, ext4, "from btrfs")},
	} {
		t.Run(c.from+" to "+c.to, func(t *testing.T) {
			before := survey(t, sources[c.from])
			var last, total int64
			stats, err := New(Options{}).Tree(t.Context(), sources[c.from], c.dst, func(done, all int64) {
				if done < last || done > all {
					t.Errorf("progress %d of %d after %d", done, all, last)
				}
				last, total = done, all
			})
			if err != nil {
				t.Fatal(err)
			}
			sameTree(t, sources[c.from], c.dst)
			if got := survey(t, sources[c.from]); fmt.Sprint(got) != fmt.Sprint(before) {
				t.Error("the source was changed, if only an access time")
			}
			if int(stats.Directories+stats.Files+stats.Symlinks+stats.Specials)+1 != len(before) {
				t.Errorf("counted %+v, the tree has %d names", stats, len(before))
			}
			if last != total || total < 16*mib {
				t.Errorf("last progress %d of %d", last, total)
			}
			if n := openUnder(t, c.dst); n != 0 {
				t.Errorf("%d files are still open", n)
			}
		})
	}
}

func TestAnEarlierCopyIsReplaced(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 128*mib)
	src, dst := sub(t, dir, "src"), sub(t, dir, "dst")
	plant(t, src, true)
	outside := filepath.Join(dir, "outside")
	if err := os.MkdirAll(filepath.Join(outside, "kept"), 0o755); err != nil {
		t.Fatal(err)
	}
	// What a copy may find: other kinds under the same names, more names, links
	// that lead out, an inheritable ACL and attributes on the root.
	for name, target := range map[string]string{"dir": outside, "setuid": "/dev/null"} {
		if err := os.Symlink(target, filepath.Join(dst, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(dst, "third/deeper/and"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dst, ".quarry-links-1/x"), 0o700); err != nil {
		t.Fatal(err)
	}
	setfacl(t, "-d", "-m", "u:1:rwx", dst)
	if err := unix.Setxattr(dst, "user.left", []byte("over"), 0); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := New(Options{}).CopyTree(t.Context(), src, dst, nil); err != nil {
			t.Fatal(err)
		}
		sameTree(t, src, dst)
	}
	if _, err := os.Stat(filepath.Join(outside, "kept")); err != nil {
		t.Errorf("a link in the target was followed: %v", err)
	}
}

func TestADeepTreeHasNoLongestPath(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 128*mib)
	src, dst := sub(t, dir, "src"), sub(t, dir, "dst")
	const depth = 300
	name := strings.Repeat("d", 200) // 60,000 bytes of path
	fd, err := unix.Open(src, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range depth {
		f, err := unix.Openat(fd, "file", unix.O_CREAT|unix.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(f, fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
		unix.Close(f)
		if err := unix.Mkdirat(fd, name, 0o755); err != nil {
			t.Fatal(err)
		}
		down, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		fd = down
	}
	unix.Close(fd)
	for range 2 { // the second time it is wiped first
		stats, err := New(Options{}).Tree(t.Context(), src, dst, nil)
		if err != nil {
			t.Fatal(err)
		}
		if stats.Directories != depth || stats.Files != depth {
			t.Fatalf("%+v, want %d of each", stats, depth)
		}
	}
	// os.Root walks by directory, too; go down and look at the last file.
	fd, err = unix.Open(dst, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range depth - 1 {
		down, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		unix.Close(fd)
		if err != nil {
			t.Fatal(err)
		}
		fd = down
	}
	f, err := unix.Openat(fd, "file", unix.O_RDONLY, 0)
	unix.Close(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(f)
	buf := make([]byte, 16)
	n, err := unix.Read(f, buf)
	if err != nil || string(buf[:n]) != fmt.Sprint(depth-1) {
		t.Fatalf("the deepest file holds %q, error %v", buf[:max(n, 0)], err)
	}
}

func TestMountsAreNeitherCopiedNorWiped(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 128*mib)
	src, dst := sub(t, dir, "src"), sub(t, dir, "dst")
	precious := sub(t, dir, "precious")
	if err := os.WriteFile(filepath.Join(precious, "data"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	// A bind mount of the same file system: st_dev does not show it.
	bind := func(t *testing.T, on string) {
		t.Helper()
		if err := unix.Mount(precious, on, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(on, 0); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("in the source", func(t *testing.T) {
		bind(t, sub(t, src, "mounted"))
		if err := New(Options{}).CopyTree(t.Context(), src, dst, nil); err != nil {
			t.Fatal(err)
		}
		names, err := os.ReadDir(filepath.Join(dst, "mounted"))
		if err != nil || len(names) != 0 {
			t.Errorf("the mount point's copy holds %v, error %v; want an empty directory", names, err)
		}
	})
	t.Run("in the target", func(t *testing.T) {
		bind(t, filepath.Join(dst, "mounted"))
		wantKind(t, New(Options{}).CopyTree(t.Context(), src, dst, nil), fault.InUse)
		if _, err := os.Stat(filepath.Join(precious, "data")); err != nil {
			t.Error(err)
		}
	})
}

func TestTreesThatCannotBeCopiedSayWhy(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 64*mib)
	src := sub(t, dir, "src")
	inner := sub(t, src, "inner")
	if err := os.WriteFile(filepath.Join(src, "file"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	free := sub(t, dir, "free")
	for _, c := range []struct {
		name, src, dst string
		kind           fault.Kind
	}{
		{"into itself", src, src, fault.Invalid},
		{"into its own directory", src, inner, fault.Invalid},
		{"out of its own directory", inner, src, fault.Invalid},
		{"source missing", filepath.Join(dir, "nothing"), free, fault.NotFound},
		{"target missing", src, filepath.Join(dir, "nothing"), fault.NotFound},
		{"source is a file", filepath.Join(src, "file"), free, fault.Invalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantKind(t, New(Options{}).CopyTree(t.Context(), c.src, c.dst, nil), c.kind)
			if _, err := os.Stat(filepath.Join(src, "file")); err != nil {
				t.Errorf("the source was harmed: %v", err)
			}
		})
	}
	t.Run("locked target", func(t *testing.T) {
		f, err := os.Open(free)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		wantKind(t, New(Options{}).CopyTree(t.Context(), src, free, nil), fault.InUse)
	})
	t.Run("no space", func(t *testing.T) {
		big := sub(t, t.TempDir(), "big")
		for i := range 10 {
			makeSparse(t, filepath.Join(big, fmt.Sprint(i)), 8*mib, []extent{{0, 8 * mib}})
		}
		wantKind(t, New(Options{}).CopyTree(t.Context(), big, free, nil), fault.Exhausted)
		if n := openUnder(t, free); n != 0 {
			t.Errorf("%d files are still open", n)
		}
	})
}

func TestACancelledTreeCopyLeavesNothingOpenAndIsMadeAgain(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 256*mib)
	src, dst := sub(t, dir, "src"), sub(t, dir, "dst")
	plant(t, src, true)
	makeSparse(t, filepath.Join(src, "large"), 64*mib, []extent{{0, 64 * mib}})
	m := New(Options{Rate: 256 * mib, Buffer: 128 << 10})
	canceled := 0
	for range 5 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.Int64N(int64(100*time.Millisecond))))
		err := m.CopyTree(ctx, src, dst, nil)
		cancel()
		if err != nil {
			wantKind(t, err, fault.Deadline)
			canceled++
		}
		if n := openUnder(t, dir); n != 0 {
			t.Fatalf("%d files are still open", n)
		}
	}
	if canceled == 0 {
		t.Fatal("no copy was cancelled: 64 MiB at 256 MiB/s take longer than 100 ms")
	}
	if err := m.CopyTree(t.Context(), src, dst, nil); err != nil {
		t.Fatal(err)
	}
	sameTree(t, src, dst)
}

// A directory that others change at will, also into links out of the tree,
// never makes the copy read or write anything outside.
func TestALinkThatAppearsDuringTheCopyLeadsNowhere(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 128*mib)
	src, dst, outside := sub(t, dir, "src"), sub(t, dir, "dst"), sub(t, dir, "outside")
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		d := sub(t, src, fmt.Sprint("d", i))
		if err := os.WriteFile(filepath.Join(d, "secret"), []byte("public"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	swapped := make(chan struct{})
	swap := sub(t, dir, "swap")
	if err := os.Symlink(outside, filepath.Join(swap, "link")); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(swapped)
		for i := 0; ctx.Err() == nil; i++ {
			at := filepath.Join(src, fmt.Sprint("d", i%200))
			for range 2 { // there and back
				_ = unix.Renameat2(unix.AT_FDCWD, at, unix.AT_FDCWD, filepath.Join(swap, "link"), unix.RENAME_EXCHANGE)
			}
		}
	}()
	for range 5 {
		err := New(Options{}).CopyTree(ctx, src, dst, nil)
		if err != nil && !errors.Is(err, fault.Conflict) {
			wantKind(t, err, fault.NotFound) // or the like: it may fail, but not escape
		}
		_ = filepath.WalkDir(dst, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				if data, _ := os.ReadFile(path); string(data) == "secret" {
					t.Errorf("%s was read through a link", path)
				}
			}
			return nil
		})
	}
	cancel()
	<-swapped
}
