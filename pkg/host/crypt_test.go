package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/klog/v2/ktesting"

	"github.com/quarry-csi/quarry/pkg/fault"
)

const testHeader = 16 << 20

// luksFile is a file with a LUKS2 header.
func luksFile(t *testing.T, passphrase Secret) (*Local, string) {
	t.Helper()
	l := NewLocal(Exec{})
	path := filepath.Join(t.TempDir(), "slab")
	f, err := os.Create(path)
	if err == nil {
		err = errors.Join(f.Truncate(testHeader+1<<20), f.Close())
	}
	if err == nil {
		err = l.FormatLUKS(context.Background(), path, testHeader, passphrase)
	}
	if err != nil {
		t.Fatal(err)
	}
	return l, path
}

func TestALUKSHeaderOpensWithItsPassphraseOnly(t *testing.T) {
	ctx := context.Background()
	l, path := luksFile(t, "a passphrase\nof two lines\n")
	cipher, err := l.segment(ctx, path, testHeader)
	if err != nil || cipher != luksCipher {
		t.Fatal(cipher, err)
	}
	key, err := l.volumeKey(ctx, path, "a passphrase\nof two lines\n")
	if err != nil || len(key) != 128 {
		t.Fatal(len(key), err)
	}
	_, err = l.volumeKey(ctx, path, "a passphrase\nof two lines")
	if !errors.Is(err, fault.Permission) {
		t.Fatal(err)
	}
	if strings.Contains(err.Error(), "two lines") || strings.Contains(err.Error(), key) {
		t.Fatal("the error tells a secret")
	}
	if _, err := l.segment(ctx, path, testHeader/2); !errors.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "16777216") {
		t.Fatal(err)
	}
	header, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(header), "a passphrase") {
		t.Fatal("the passphrase is on the device")
	}
}

func TestWhatHasNoLUKSHeaderIsCorrupt(t *testing.T) {
	ctx := context.Background()
	l, path := luksFile(t, "x")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, testHeader), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := l.segment(ctx, path, testHeader); !errors.Is(err, fault.Corrupt) {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := l.segment(ctx, path, testHeader); err == nil {
		t.Fatal("a header was found in an empty file")
	}
}

// Each is a header that cryptsetup 2.6.1 makes, and Quarry does not.
func TestAForeignHeaderIsRefused(t *testing.T) {
	const good = `{"segments":{"0":{"type":"crypt","offset":"16777216","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":4096}},"config":{"json_size":"12288"}}`
	if cipher, err := parseSegment([]byte(good), "/dev/x", testHeader); err != nil || cipher != "aes-xts-plain64" {
		t.Fatal(cipher, err)
	}
	for _, change := range [][2]string{
		{`"sector_size":4096`, `"sector_size":512`},
		{`"size":"dynamic"`, `"size":"1048576"`},
		{`"offset":"16777216"`, `"offset":"8388608"`},
		{`"type":"crypt"`, `"type":"linear"`},
		{`"iv_tweak":"0"`, `"iv_tweak":"8"`},
		{`"sector_size":4096`, `"sector_size":4096,"integrity":{"type":"hmac(sha256)"}`},
		{`"json_size":"12288"`, `"json_size":"12288","requirements":{"mandatory":["online-reencrypt"]}`},
		{`"segments":{`, `"segments":{"1":{"type":"crypt"},`},
		{`}}`, ``},
	} {
		bad := strings.Replace(good, change[0], change[1], 1)
		if bad == good {
			t.Fatal(change)
		}
		if _, err := parseSegment([]byte(bad), "/dev/x", testHeader); !errors.Is(err, fault.Corrupt) {
			t.Errorf("%s: %v", change[1], err)
		}
	}
}

// Recorded from cryptsetup 2.6.1, of a throw-away volume, shortened; the second as 2.7 words it.
func TestTheVolumeKeyIsRead(t *testing.T) {
	digits := strings.TrimSpace(strings.Repeat("f9 8b f4 91 bd 8b 63 2a 32 50 3e e9 e9 54 d1 05 \n\t\t", 4))
	want := strings.Join(strings.Fields(digits), "")
	for _, label := range []string{"MK", "Volume key"} {
		text := "LUKS header information for /dev/x\nCipher name:   \taes\nMK bits:       \t512\n" + label + " dump:\t" + digits + " \n"
		if got, err := parseVolumeKey([]byte(text), "/dev/x"); err != nil || got != want {
			t.Errorf("%s: %q %v", label, got, err)
		}
	}
	for _, text := range []string{"", "MK dump:\n", "MK dump:\tf9 8b\n", "MK bits: 512\n"} {
		if _, err := parseVolumeKey([]byte(text), "/dev/x"); !errors.Is(err, fault.Internal) || strings.Contains(err.Error(), "8b") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestCryptsetupsErrorsHaveKindsAndNoOutput(t *testing.T) {
	for status, kind := range map[int]fault.Kind{1: fault.Unavailable, 2: fault.Permission, 3: fault.Exhausted, -1: fault.Exhausted, 4: fault.Unavailable, 5: fault.InUse} {
		for _, said := range []string{"", "said\nwhat"} {
			exit := &ExitError{Command: Command{Name: cryptsetup}, Result: Result{ExitCode: status, Stdout: []byte("MK dump: aa bb"), Stderr: []byte(said)}}
			err := luksError("open", "/dev/x", exit)
			if fault.KindOf(err) != kind || strings.Contains(err.Error(), "aa bb") {
				t.Errorf("%d: %v", status, err)
			}
		}
	}
}

func TestNothingPrintsASecret(t *testing.T) {
	const text = "correct horse"
	v := struct{ Passphrase Secret }{text}
	log := ktesting.NewLogger(t, ktesting.NewConfig(ktesting.BufferLogs(true)))
	log.Info("stage", "request", v, "secret", v.Passphrase)
	buffered := log.GetSink().(ktesting.Underlier).GetBuffer().String()
	js, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	out := []string{buffered, string(js)}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		out = append(out, fmt.Sprintf(verb, v), fmt.Sprintf(verb, v.Passphrase), fmt.Sprintf(verb, &v))
	}
	for _, s := range out {
		if strings.Contains(s, text) || strings.Contains(s, fmt.Sprintf("%x", text)) {
			t.Errorf("%q", s)
		}
	}
}
