package csi

import (
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// redacted prints a message for the log without what it must not show: fields
// that the specification marks csi_secret, and mount flags, which "may contain
// sensitive information".
type redacted struct{ message any }

// String implements fmt.Stringer. The work is done only when somebody prints.
func (r redacted) String() string {
	m, ok := r.message.(proto.Message)
	if !ok {
		return fmt.Sprintf("%T", r.message)
	}
	c := proto.Clone(m)
	strip(c.ProtoReflect())
	text, err := protojson.Marshal(c)
	if err != nil {
		return fmt.Sprintf("%T that cannot be printed", r.message)
	}
	return string(text)
}

// MarshalLog makes klog print the redacted text whatever its format.
func (r redacted) MarshalLog() any { return r.String() }

func strip(m protoreflect.Message) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case secret(f):
			m.Clear(f)
		case f.Message() == nil:
		case f.IsMap():
			if f.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { strip(v.Message()); return true })
			}
		case f.IsList():
			for i := range v.List().Len() {
				strip(v.List().Get(i).Message())
			}
		default:
			strip(v.Message())
		}
		return true
	})
}

func secret(f protoreflect.FieldDescriptor) bool {
	if f.FullName() == "csi.v1.VolumeCapability.MountVolume.mount_flags" {
		return true
	}
	marked, ok := proto.GetExtension(f.Options(), csi.E_CsiSecret).(bool)
	return ok && marked
}
