package domain

import (
	"errors"
	"maps"
	"reflect"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
)

func TestANodeOpensWhatTheEntrySays(t *testing.T) {
	params := map[string]string{"path": "/srv"}
	for _, c := range []struct {
		entry Entry
		kind  string
		want  Entry
	}{
		{Entry{Name: "a", Engine: "dir", Params: params}, "dir", Entry{Engine: "dir", Params: params}},
		{Entry{Name: "a", Engine: "dir", Process: true, Params: params}, "dir", Entry{Name: "a", Engine: "dir", Process: true, Params: params}},
		{Entry{Name: "a", Engine: "san", Socket: "/x", Params: params}, "socket", Entry{Name: "a", Engine: "san", Socket: "/x", Params: params}},
		{Entry{Name: "a", Engine: SocketEngine, Socket: "/x"}, "socket", Entry{Name: "a", Engine: SocketEngine, Socket: "/x", Params: map[string]string{}}},
	} {
		kind, carried := c.entry.ForNode()
		if kind != c.kind {
			t.Errorf("%+v goes as %q, want %q", c.entry, kind, c.kind)
		}
		c.want.Secrets = Secrets{"s": "x"}
		if got, err := testRegistry().FromNode(kind, carried, map[string]string{"s": "x"}); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%+v arrives as %+v, %v, want %+v", c.entry, got, err, c.want)
		}
	}
	if !maps.Equal(params, map[string]string{"path": "/srv"}) {
		t.Errorf("an entry's parameters were changed: %v", params)
	}
}

func TestANodeRefusesWhatItDoesNotKnow(t *testing.T) {
	for _, c := range []struct {
		kind   string
		params map[string]string
		fault  fault.Kind
		want   string
	}{
		{"zfs", nil, fault.Invalid, `engine "zfs" is unknown: known are "dir", "share", "share4"`},
		{"dir", map[string]string{"quarry.dev/tomorrow": "1"}, fault.Invalid, `parameter "quarry.dev/tomorrow" is unknown to engine "dir": only "path" is known`},
		{"socket", map[string]string{"path": "/x"}, fault.Invalid, "a domain behind a socket needs the parameters quarry.dev/socket and quarry.dev/engine"},
		{"socket", map[string]string{"quarry.dev/socket": "/x", "quarry.dev/engine": "a", "quarry.dev/tomorrow": "1"}, fault.Unsupported,
			`parameter "quarry.dev/tomorrow" is unknown here: the controller is newer than this node's agent`},
	} {
		if _, err := testRegistry().FromNode(c.kind, c.params, nil); !errors.Is(err, c.fault) || err.Error() != c.want {
			t.Errorf("%s %v: %v, want %s", c.kind, c.params, err, c.want)
		}
	}
}
