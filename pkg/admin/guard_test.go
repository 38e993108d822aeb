package admin

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// startLoopback serves f at a loopback address.
func startLoopback(t *testing.T, f *fake) (*Client, net.Addr) {
	t.Helper()
	e, err := ParseLoopback("tcp://127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := e.Listen()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, Guard(l, Handler(f, Version{Version: "v1"}, nil)), 5*time.Second) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	served, err := ParseLoopback("tcp://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return NewClient(served), l.Addr()
}

func TestAWebPageGetsNoAnswerAtALoopbackAddress(t *testing.T) {
	f := checked()
	c, at := startLoopback(t, f)
	if v, err := c.Version(t.Context()); err != nil || v.Version != "v1" {
		t.Fatalf("the client itself: %+v, %v", v, err)
	}
	for what, x := range map[string]struct {
		host   string
		header map[string]string
		say    string
	}{
		"by curl":                      {at.String(), map[string]string{"Quarry-Admin": "1"}, ""},
		"by curl and name":             {"localhost:9811", map[string]string{"Quarry-Admin": "1"}, ""},
		"by curl and IPv6":             {"[::1]:9811", map[string]string{"Quarry-Admin": "1"}, ""},
		"by curl and IPv6 and no port": {"[::1]", map[string]string{"Quarry-Admin": "1"}, ""},
		"a page of another origin":     {at.String(), map[string]string{"Content-Type": "text/plain"}, `the header "Quarry-Admin" is missing`},
		"a page that lies and asks":    {at.String(), map[string]string{"Quarry-Admin": "1", "Origin": "https://evil.example"}, `the request is a web page's, of "https://evil.example"`},
		"a page whose name is ours":    {"evil.example:9811", map[string]string{"Quarry-Admin": "1"}, `host "evil.example:9811" is not Quarry's`},
		"a name that begins as ours":   {"127.0.0.1.evil.example", map[string]string{"Quarry-Admin": "1"}, `host "127.0.0.1.evil.example" is not Quarry's`},
		"an address that is not ours":  {"10.0.0.1:9811", map[string]string{"Quarry-Admin": "1"}, `host "10.0.0.1:9811" is not Quarry's`},
	} {
		r, err := http.NewRequest(http.MethodPost, "http://"+at.String()+"/v1/fix", strings.NewReader(`{"apply":true,"ids":["f1"]}`))
		if err != nil {
			t.Fatal(err)
		}
		r.Host = x.host
		for k, v := range x.header {
			r.Header.Set(k, v)
		}
		f.fixed = nil
		resp, err := new(http.Client).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		var fail failure
		_ = json.NewDecoder(resp.Body).Decode(&fail)
		resp.Body.Close()
		if x.say == "" {
			if resp.StatusCode != http.StatusOK || len(f.fixed) != 1 {
				t.Errorf("%s: %s, %+v, fixed %v", what, resp.Status, fail, f.fixed)
			}
			continue
		}
		if resp.StatusCode != http.StatusForbidden || !strings.HasPrefix(fail.Error.Message, x.say) || f.fixed != nil {
			t.Errorf("%s: %s, %q, fixed %v", what, resp.Status, fail.Error.Message, f.fixed)
		}
		if resp.Header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%s: pages are let in", what)
		}
	}
}

func TestOnlyLoopbackAddressesAreServed(t *testing.T) {
	for s, want := range map[string]string{
		"tcp://127.0.0.1:9811": "tcp://127.0.0.1:9811", "tcp://[::1]:1": "tcp://[::1]:1", "tcp://127.1.2.3:0": "tcp://127.1.2.3:0",
		"unix:///run/a.sock": "unix:///run/a.sock", "/run/a.sock": "unix:///run/a.sock",
	} {
		if e, err := ParseLoopback(s); err != nil || e.String() != want {
			t.Errorf("%q: %v, %v", s, e, err)
		}
	}
	const form = `: must be tcp://ADDRESS:PORT with an address in digits, such as tcp://127.0.0.1:9811`
	for s, want := range map[string]string{
		"tcp://:9811":           `endpoint "tcp://:9811"` + form,
		"tcp://localhost:9811":  `endpoint "tcp://localhost:9811"` + form,
		"tcp://127.0.0.1":       `endpoint "tcp://127.0.0.1"` + form,
		"tcp://127.0.0.1:99999": `endpoint "tcp://127.0.0.1:99999"` + form,
		"tcp://0.0.0.0:9811":    `endpoint "tcp://0.0.0.0:9811": 0.0.0.0 is not a loopback address: whoever reaches it may delete images, so only 127.0.0.0/8 and [::1] are allowed`,
		"tcp://[::]:9811":       `endpoint "tcp://[::]:9811": :: is not a loopback address: whoever reaches it may delete images, so only 127.0.0.0/8 and [::1] are allowed`,
		"tcp://10.1.2.3:9811":   `endpoint "tcp://10.1.2.3:9811": 10.1.2.3 is not a loopback address: whoever reaches it may delete images, so only 127.0.0.0/8 and [::1] are allowed`,
		"http://127.0.0.1:9811": `endpoint "http://127.0.0.1:9811": scheme "http" is not allowed: unix:///path`,
	} {
		if _, err := ParseLoopback(s); !errors.Is(err, fault.Invalid) || err.Error() != want {
			t.Errorf("%q: %v", s, err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	e, err := ParseLoopback("tcp://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Listen(); !errors.Is(err, fault.InUse) {
		t.Errorf("a second server at one address: %v", err)
	}
}
