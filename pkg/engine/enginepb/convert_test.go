package enginepb

import (
	"reflect"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/quarry-csi/quarry/pkg/engine"
)

// Everything that a domain says of itself arrives: no field of engine.Description is left out.
func TestADescriptionArrivesWhole(t *testing.T) {
	d := engine.Description{Kinds: []engine.Kind{engine.Block, engine.Tree}, Granularity: 4096, MaxSlabSize: 1 << 40, MaxTags: 7, ZeroedSpace: true, AtomicListing: true,
		SharedAccess: true, MultiWriterBlock: true, Location: "/srv (ext4)", Params: map[string]string{"mode": "help"},
		ParamValues: map[string]string{"mode": "[0-7]+"}, TreeParams: []string{"mode"}, MountOptions: true, Notes: []string{"a note"}}
	v := reflect.ValueOf(d)
	for i := range v.NumField() {
		if v.Field(i).IsZero() {
			t.Errorf("this test leaves out %s", v.Type().Field(i).Name)
		}
	}
	b, err := proto.Marshal(DescriptionOf(d))
	if err != nil {
		t.Fatal(err)
	}
	r := &DescribeResponse{}
	if err := proto.Unmarshal(b, r); err != nil {
		t.Fatal(err)
	}
	if got := r.Go(); !reflect.DeepEqual(got, d) {
		t.Errorf("%+v became %+v", d, got)
	}
}
