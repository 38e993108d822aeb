// Package image tests the Dockerfile; hack/image builds it.
package image

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

func read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// packages that the last stage installs.
func packages(t *testing.T) []string {
	t.Helper()
	_, install, ok := strings.Cut(read(t, "Dockerfile"), "apt-get install -y --no-install-recommends")
	if !ok {
		t.Fatal("the Dockerfile installs nothing")
	}
	install, _, _ = strings.Cut(install, "&&")
	return strings.Fields(strings.ReplaceAll(install, "\\", ""))
}

// What hack/deps says that a node needs is in the image, and nothing else, but for the
// authorities by which servers of traces are known.
func TestTheImageHasWhatNodesNeed(t *testing.T) {
	out, err := exec.Command(filepath.Join(root, "hack/deps"), "--print", "node").Output()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"ca-certificates"}
	for _, line := range strings.Fields(string(out)) {
		_, name, ok := strings.Cut(line, ":")
		if !ok {
			t.Fatalf("hack/deps says %q", line)
		}
		want = append(want, name)
	}
	slices.Sort(want)
	want = slices.Compact(want)
	if got := packages(t); !slices.Equal(got, want) {
		t.Errorf("the Dockerfile installs %q\nhack/deps --print node has %q", got, want)
	}
}

// Every program that is started by its name is one that hack/deps knows.
func TestNothingIsCalledThatIsMissing(t *testing.T) {
	out, err := exec.Command(filepath.Join(root, "hack/deps"), "--print", "node").Output()
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{"timeout": true, "head": true} // coreutils, which Debian always has
	for _, line := range strings.Fields(string(out)) {
		program, _, _ := strings.Cut(line, ":")
		have[program] = true
	}
	var called int
	name := regexp.MustCompile(`\bName:\s*"([a-z0-9._]+)"`)
	err = filepath.WalkDir(filepath.Join(root, "pkg"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(text), "Command{") {
			return err
		}
		for _, m := range name.FindAllStringSubmatch(string(text), -1) {
			if !strings.Contains(m[0], "mkfs.") {
				called++
			}
			if m[1] != "mkfs." && !have[m[1]] { // completed by the filesystem, see below
				t.Errorf("%s calls %s, which hack/deps does not know", path, m[1])
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if called < 8 {
		t.Errorf("only %d calls were found", called)
	}
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		if !have["mkfs."+fs] {
			t.Errorf("mkfs.%s is missing", fs)
		}
	}
}

func TestTheImageIsNobodyUnlessAPodSaysOtherwise(t *testing.T) {
	if !strings.Contains(read(t, "Dockerfile"), "\nUSER 65532:65532\n") {
		t.Error("it runs as root")
	}
}

// The version of Go is that of go.mod.
func TestItIsBuiltWithTheGoOfGoMod(t *testing.T) {
	mod := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(read(t, "go.mod"))
	image := regexp.MustCompile(`(?m)^FROM golang:(\d+\.\d+)-bookworm`).FindStringSubmatch(read(t, "Dockerfile"))
	if mod == nil || image == nil || mod[1] != image[1] {
		t.Errorf("go.mod: %q, Dockerfile: %q", mod, image)
	}
}
